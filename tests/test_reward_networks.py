"""Rewards that hold networks: frozen, on the right device, reading tokens."""

from __future__ import annotations

import functools

import pytest
import torch

from policylab.data.text import Completion
from policylab.errors import UserError
from policylab.rewards.base import Scores, ScoringBatch
from policylab.rewards.networks import networks
from policylab.rewards.scorer import Scorer
from policylab.rewards.sentiment import sentiment
from policylab.rewards.weighted_sum import WeightedSum


class Reader(torch.nn.Module):
    """A network that reads tokens and gives the sum of their squares, with all weights 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.ones_(self.layer.weight)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return self.layer((ids * mask).float().square().sum(-1, keepdim=True))[:, 0]


class Model:
    """A reward with networks, which reads tokens and device."""

    def __init__(self) -> None:
        self.networks = {"reader": Reader(), "other": torch.nn.Dropout()}

    def score(self, batch: ScoringBatch) -> Scores:
        ids, mask = batch.tokens()
        return Scores(self.networks["reader"](ids, mask), {"length": mask.sum(-1)})


class Callable:
    """A reward that has a network, and a reference to itself."""

    def __init__(self, network: torch.nn.Module) -> None:
        self.network, self.again = network, self

    def __call__(self, completions):
        return [1.0] * len(completions)


class Slotted:
    """A reward that keeps a network in a slot, under a name that Python mangles, beside a slot that is empty."""

    __slots__ = ("__network", "empty")

    def __init__(self, network: torch.nn.Module) -> None:
        self.__network = network

    def __call__(self, completions):
        return [1.0] * len(completions)


class Lazy:
    """A reward that makes its network when it scores."""

    def __init__(self, mode: bool) -> None:
        self.mode, self.network = mode, None

    def __call__(self, completions):
        self.network = self.network or torch.nn.Linear(1, 1).train(self.mode)
        return [1.0] * len(completions)


class Ring:
    """A reward that knows all rewards, itself among them."""

    def __init__(self, known: list) -> None:
        self.known = known
        known.append(self)

    def __call__(self, completions):
        return [1.0] * len(completions)


def with_gradients(completions):
    return [float(torch.is_grad_enabled())] * len(completions)


def by(completions, model):
    return [1.0] * len(completions)


def completion(*tokens: int) -> Completion:
    return Completion("it is", " good", None, tokens, True)


class TestNetworks:
    @pytest.mark.parametrize(
        ("workers", "pool"),
        [(0, "process"), (2, "thread"), pytest.param(2, "process", marks=pytest.mark.slow)],
    )
    def test_a_reward_reads_tokens_by_its_own_network(self, workers, pool):
        with Scorer(Model(), workers, pool) as scorer:
            scores = scorer.begin([completion(1), completion(1, 1, 1), completion(1, 1)])()
        assert scores == Scores([1.0, 3.0, 2.0], {"length": [1.0, 3.0, 2.0]})
        assert not any(network.training for network in scorer.reward.networks.values())
        assert not scorer.reward.networks["reader"].layer.weight.requires_grad

    def test_tokens_are_padded_on_the_right(self):
        ids, mask = ScoringBatch((completion(5), completion(7, 0), completion())).tokens()
        assert ids.tolist() == [[5, 0], [7, 0], [0, 0]]
        assert mask.tolist() == [[True, False], [True, True], [False, False]]
        assert ScoringBatch(()).tokens()[0].shape == (0, 0)

    def test_networks_are_moved_where_they_score_in_this_process(self):
        for pool, device in (("thread", "meta"), ("process", "cpu")):
            with Scorer(Model(), 2, pool) as scorer:
                scorer.move(torch.device("meta"))
            assert scorer.device == device
            assert scorer.reward.networks["reader"].layer.weight.device.type == device

    def test_those_of_a_weighted_sum_too(self):
        scorer = Scorer(WeightedSum({"a": Model(), "b": sentiment}, {"a": 1.0, "b": 2.0}))
        scorer.move("meta")
        assert scorer.reward.parts["a"].networks["reader"].layer.weight.device.type == "meta"

    @pytest.mark.parametrize("kind", ["object", "partial", "part", "slots"])
    def test_those_of_a_callable_are_frozen_and_stay_where_they_are(self, kind):
        """A callable does not get the device."""
        network = torch.nn.Linear(1, 1)
        reward = functools.partial(by, model=network) if kind == "partial" else Callable(network)
        reward = Slotted(network) if kind == "slots" else reward
        scorer = Scorer(WeightedSum({"a": reward}, {"a": 1.0}) if kind == "part" else reward)
        scorer.move("meta")
        assert not network.training
        assert not network.weight.requires_grad
        assert network.weight.device.type == "cpu"

    @pytest.mark.parametrize(("workers", "pool"), [(0, "process"), (2, "thread")])
    def test_one_that_is_made_while_scoring_is_frozen_or_refused(self, workers, pool):
        with Scorer(Lazy(mode=False), workers, pool) as scorer:
            scorer.begin([completion(1)])()
        assert not scorer.reward.network.weight.requires_grad
        with (
            Scorer(Lazy(mode=True), workers, pool) as scorer,
            pytest.raises(
                UserError, match=r"reward Lazy .* in training mode \(Linear\), .* call eval\(\) on it"
            ),
        ):
            scorer.begin([completion(1)])()

    @pytest.mark.slow
    def test_in_a_process_it_is_refused_too(self):
        with (
            Scorer(Lazy(mode=True), 1, "process") as scorer,
            pytest.raises(UserError, match=r"reward Lazy .* in training mode"),
        ):
            scorer.begin([completion(1)])()

    def test_rewards_that_refer_to_each_other(self):
        """Each is searched once, whatever the number of ways to it."""
        known = []
        for _ in range(30):
            Ring(known).network = torch.nn.Linear(1, 1)
        assert len(networks(known[0])) == 30


@pytest.mark.parametrize(
    ("workers", "pool"),
    [(0, "process"), (2, "thread"), pytest.param(1, "process", marks=pytest.mark.slow)],
)
def test_rewards_score_without_gradients_wherever_they_run(workers, pool):
    with torch.enable_grad(), Scorer(with_gradients, workers, pool) as scorer:
        assert scorer.begin([completion(1)])().total == [0.0]
