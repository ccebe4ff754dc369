"""Rewards that hold networks: frozen, on the right device, reading tokens."""

from __future__ import annotations

import functools

import pytest
import torch

from policylab.data.text import Completion
from policylab.rewards.base import Scores, ScoringBatch
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

    @pytest.mark.parametrize("kind", ["object", "partial", "part"])
    def test_those_of_a_callable_are_frozen_and_stay_where_they_are(self, kind):
        """A callable does not get the device."""
        network = torch.nn.Linear(1, 1)
        reward = functools.partial(by, model=network) if kind == "partial" else Callable(network)
        scorer = Scorer(WeightedSum({"a": reward}, {"a": 1.0}) if kind == "part" else reward)
        scorer.move("meta")
        assert not network.training
        assert not network.weight.requires_grad
        assert network.weight.device.type == "cpu"
