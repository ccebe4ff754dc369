"""Any option of any axis works with any preset, or is refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from policylab.config.build import check_parts, instantiate
from policylab.errors import UserError
from small_runs import algo, small

ALGO = Path(__file__).parent.parent / "configs" / "algo"
#: Axes that only Q-learning has; test_q_learning.py combines them.
Q_AXES = {"backup", "dueling", "exploration", "target"}
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in ALGO.glob("*/*.yaml") if path.parent.name not in Q_AXES
)
#: One of each kind: a critic and several updates, a group and one update, the KL in the loss, a trust region.
PRESETS = (
    "ppo",
    pytest.param("grpo", marks=pytest.mark.slow),
    pytest.param("rloo", marks=pytest.mark.slow),
    pytest.param("trpo", marks=pytest.mark.slow),
)
REASONS = (
    "needs a critic|for only one update|uses no critic|algo/reference is none|chooses its length|one ratio a sequence"
    "|credits whole sequences|corrects for the sampler|which is 1 in the first step"
)


def build_algo(overrides: list[str]) -> object:
    """Builds ``["algo=ppo", ...]`` without composing the other groups, which would take most of the time."""
    preset = overrides[0].removeprefix("algo=")
    return instantiate(small(algo(preset, *overrides[1:]), {}).algo)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_fits_or_is_refused_with_the_reason(preset, option):
    needed = ["algo.critic.init=some/folder"] if option == "critic=reward_model" else []
    config = small(algo(preset, f"algo/{option}", *needed), {})
    check_parts(config)  # no key of the preset remains if the option has none
    try:
        instantiate(config.algo)
        refusal = ""
    except UserError as error:
        refusal = str(error)
    assert not refusal or re.search(REASONS, refusal)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["algo=grpo", "algo/surrogate=logprob"], "right for only one update"),
        (["algo=trpo", "algo/surrogate=logprob"], "chooses its length"),
        (["algo=trpo", "algo/surrogate=cispo"], "chooses its length"),
        (["algo=ppo", "algo/advantage=vtrace", "algo.update.reestimate=true"], "already does"),
        (["algo=gspo", "algo/importance=truncated"], "a weight for each token"),
        (["algo=ppo", "algo.entropy_coef=-1"], "entropy_coef is -1"),
        (["algo=ppo", "algo.surrogate.dual_clip=1.1"], "dual_clip is 1.1"),
        (["algo=ppo", "algo/surrogate=sequence_ratio"], "one ratio a sequence"),
        (["algo=rloo", "algo.kl.estimator=exact"], "credits whole sequences"),
        (["algo=ppo", "algo/advantage=vtrace", "algo/importance=truncated"], "corrects for the sampler"),
        (["algo=grpo", "algo.update.reestimate=true"], "uses no critic"),
        (["algo=ppo", "algo/update=single_step"], "which is 1 in the first step"),
        (["algo=gspo", "algo/update=single_step"], "which is 1 in the first step"),
        (["algo=cispo", "algo/update=single_step"], "which is 1 in the first step"),
        (["algo=npg", "algo/surrogate=clipped_ratio"], "which is 1 in the first step"),
        (
            ["algo=ppo", "algo.update.epochs=1", "algo.update.minibatches=1", "algo.update.kl_stop=0.1"],
            "kl_stop=0.1 ends an iteration after its first update",
        ),
        (["algo=dqn", "algo.n_step=null", "algo.backup.double=false"], "use no network"),
        (["algo=ppo", "algo/reference=none"], "algo/reference is none"),
        (["algo=ppo", "algo/critic=none"], "needs a critic"),
        (["algo=a2c", "algo.critic.clip=0.2"], "after a rollout's first update"),
        (["algo=reinforce", "algo.advantage.whiten=true"], "subtracts the mean itself"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides, reason):
    with pytest.raises(UserError, match=reason):
        build_algo(overrides)


def test_without_a_line_search_the_log_prob_is_allowed():
    """Its gradient equals the ratio's."""
    build_algo(["algo=npg", "algo/surrogate=logprob"])


@pytest.mark.parametrize(
    "overrides",
    [
        ["algo=ppo", "algo/update=single_step", "algo/surrogate=ratio"],
        ["algo=ppo", "algo/update=trust_region"],  # the search sees the bounds
        ["algo=ppo", "algo.update.epochs=1", "algo.update.minibatches=1"],
        ["algo=ppo", "algo.update.epochs=1", "algo.update.kl_stop=0.1"],
        ["algo=dqn", "algo.n_step=null", "algo.backup.double=false", "algo/target=none"],
        ["algo=dqn", "algo.n_step=null", "algo.backup.corrected=true"],
        ["algo=soft_q", "algo/target=periodic"],
    ],
)
def test_its_neighbours_are_not(overrides):
    build_algo(overrides)


def test_the_critic_needs_equal_shares(compose):
    from policylab.training.methods import method_of

    config = compose(["algo=trpo", "rollout.prompts=5", "rollout.group_size=2"])
    with pytest.raises(
        UserError, match=r"10 sequences cannot be cut into algo\.update\.critic_minibatches=4"
    ):
        method_of(instantiate(config.algo)).plan(config.rollout, 1)
    uncritical = compose(["algo=trpo", "algo/advantage=group", "rollout.prompts=5", "rollout.group_size=2"])
    method_of(instantiate(uncritical.algo)).plan(uncritical.rollout, 1)


def test_groups_are_required(compose):
    from policylab.training.methods import method_of

    config = compose(["algo=rloo", "rollout.group_size=1"])
    with pytest.raises(UserError, match=r"rollout\.group_size is 1; take rollout\.group_size=2"):
        method_of(instantiate(config.algo)).plan(config.rollout, 1)
