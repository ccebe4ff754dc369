"""Any option of any axis goes with any preset, or is refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from policylab.config.build import check_parts, instantiate
from policylab.errors import UserError

ALGO = Path(__file__).parent.parent / "configs" / "algo"
#: Axes of Q-learning alone; test_q_learning.py combines them.
Q_AXES = {"backup", "dueling", "exploration", "target"}
OPTIONS = sorted(
    f"{path.parent.name}={path.stem}" for path in ALGO.glob("*/*.yaml") if path.parent.name not in Q_AXES
)
#: One of each kind: a critic and several updates, a group and one update, the KL in the loss, a trust region.
PRESETS = (
    "ppo",
    "grpo",
    pytest.param("rloo", marks=pytest.mark.slow),
    pytest.param("trpo", marks=pytest.mark.slow),
)
REASONS = (
    "needs a critic|right for one update|reads no critic|algo/reference is none|searches by that|one ratio a sequence"
    "|credits whole sequences|corrects for the sampler"
)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_fits_or_is_refused_with_the_reason(compose, preset, option):
    needed = ["algo.critic.init=some/folder"] if option == "critic=reward_model" else []
    config = compose([f"algo={preset}", f"algo/{option}", *needed])
    check_parts(config)  # no key of the preset is left over where the option has none
    try:
        instantiate(config.algo)
        refusal = ""
    except UserError as error:
        refusal = str(error)
    assert not refusal or re.search(REASONS, refusal)


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["algo=grpo", "algo/surrogate=logprob"], "right for one update"),
        (["algo=trpo", "algo/surrogate=logprob"], "searches by that"),
        (["algo=trpo", "algo/surrogate=cispo"], "searches by that"),
        (["algo=ppo", "algo/advantage=vtrace", "algo.update.reestimate=true"], "does already"),
        (["algo=gspo", "algo/importance=truncated"], "a weight for each token"),
        (["algo=ppo", "algo.entropy_coef=-1"], "entropy_coef is -1"),
        (["algo=ppo", "algo.surrogate.dual_clip=1.1"], "dual_clip is 1.1"),
        (["algo=ppo", "algo/surrogate=sequence_ratio"], "one ratio a sequence"),
        (["algo=rloo", "algo.kl.estimator=exact"], "credits whole sequences"),
        (["algo=ppo", "algo/advantage=vtrace", "algo/importance=truncated"], "corrects for the sampler"),
        (["algo=grpo", "algo.update.reestimate=true"], "reads no critic"),
        (["algo=ppo", "algo/reference=none"], "algo/reference is none"),
        (["algo=ppo", "algo/critic=none"], "needs a critic"),
        (["algo=a2c", "algo.critic.clip=0.2"], "before a rollout's first update"),
        (["algo=reinforce", "algo.advantage.whiten=true"], "subtracts the mean itself"),
    ],
)
def test_what_makes_no_sense_is_refused(compose, overrides, reason):
    with pytest.raises(UserError, match=reason):
        instantiate(compose(overrides).algo)


def test_without_a_line_search_the_log_prob_will_do(compose):
    """Its gradient is the ratio's."""
    instantiate(compose(["algo=npg", "algo/surrogate=logprob"]).algo)


def test_groups_are_demanded(compose):
    from policylab.config.build import batch_plan

    config = compose(["algo=rloo", "rollout.group_size=1"])
    with pytest.raises(UserError, match=r"rollout\.group_size is 1; take rollout\.group_size=2"):
        batch_plan(config, instantiate(config.algo))
