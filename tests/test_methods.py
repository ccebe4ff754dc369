"""Families of methods: one table maps an algorithm to its family, and each family states its needs and costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from policylab.config.build import instantiate
from policylab.data.plan import BatchPlan
from policylab.errors import UserError
from policylab.training.methods import METHODS, Cost, CriticNeed, Method, Needs, method_of, register

PRESETS = sorted(p.stem for p in (Path(__file__).parent.parent / "configs" / "algo").glob("*.yaml"))
FAMILIES = {
    "trpo": "TrustRegion",
    "npg": "TrustRegion",
    "dqn": "QLearning",
    "soft_q": "QLearning",
    "sft": "Supervised",
}


def method(compose, *overrides) -> Method:
    return method_of(instantiate(compose(list(overrides)).algo))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_has_a_family(compose, preset):
    family = FAMILIES.get(preset, "PolicyGradient")
    assert type(method(compose, f"algo={preset}")).__name__ == f"{family}Method"


@pytest.mark.parametrize(
    ("overrides", "needs"),
    [
        (["algo=sft"], Needs(learns_from="completions")),
        (["algo=grpo", "algo/kl=none", "algo/reference=none"], Needs()),
        (["algo=grpo", "algo/reference=moving"], Needs(reference="moving")),
        (["algo=ppo"], Needs(critic=CriticNeed(0), reference="frozen")),
        (
            ["algo=ppo", "algo/advantage=group_mean"],
            Needs(reference="frozen"),
        ),  # its critic would not be used
        (["algo=trpo"], Needs(critic=CriticNeed(0), reference="frozen", whole_distributions=True)),
        (
            ["algo=dqn", "algo/target=none", "algo/dueling=none", "algo.backup.double=false"],
            Needs(reference="frozen", whole_distributions=True),
        ),
    ],
)
def test_what_a_method_needs(compose, overrides, needs):
    assert method(compose, *overrides).needs() == needs


def test_costs_by_hand(compose):
    plan = BatchPlan(prompts=4, group_size=2, epochs=3, minibatches=1, processes=1)
    grpo = method(compose, "algo=grpo")
    assert grpo.cost(plan, exact=True) == Cost(forwards=1, passes=grpo.algorithm.update.epochs)
    assert grpo.cost(plan, exact=False).forwards == 2  # log-probs once more
    # 10 conjugate gradients: 11 products of 5 on a tenth of the rows; gradient 3, length 3, search 4, critic 5
    trpo = method(
        compose,
        "algo=trpo",
        "algo.update.critic_epochs=5",
        "algo.update.fisher_share=0.1",
        "algo.update.cg_iterations=10",
    )
    assert trpo.cost(plan, exact=True).passes == pytest.approx((3 + 0.1 * 5 * 11 + 3 + 4 + 5) / 3)
    one_step = ["algo=grpo", "algo/update=single_step", "algo/surrogate=ratio"]
    assert (
        method(compose, *one_step).cost(plan, exact=False).forwards == 1
    )  # its only pass gives the log-probs
    assert (
        trpo.cost(plan, exact=False).forwards == trpo.cost(plan, exact=True).forwards + 1
    )  # a search has several


@dataclass(frozen=True)
class Mine:
    """An algorithm of an unregistered family."""


class MineMethod(Method[Mine]):
    def trainer(self, parts):
        raise NotImplementedError


def test_an_unknown_family_is_refused_and_a_registered_one_is_found(monkeypatch):
    monkeypatch.setattr("policylab.training.methods.METHODS", dict(METHODS))
    with pytest.raises(UserError, match=r"Mine, which no family .*methods\.register\(Mine, METHOD\)"):
        method_of(Mine())
    register(Mine, MineMethod)
    mine = method_of(Mine())
    assert isinstance(mine, MineMethod)
    assert (mine.needs(), mine.cost(BatchPlan(2, 1, 1, 1, 1), exact=True)) == (Needs(), Cost())
