"""Exactness: vocabulary 3, length 3, all 27 sequences.

The policy is a table of logits, one row for each prefix. The expected gradient of an estimator is the sum
over all sequences of probability x gradient of its loss; where theory says that it is unbiased, it equals
autograd's gradient of the expected reward.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from policylab.algorithms import (
    GAE,
    Algorithm,
    ClippedRatio,
    Critic,
    FixedCoefficient,
    KLPenalty,
    LogProb,
    MinibatchEpochs,
    ReturnToGo,
    SequenceSum,
)
from policylab.functional import kl
from policylab.rollouts.types import Evaluation, Rollout

V, T = 3, 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))  # [27, 3]
PREFIXES = {p: i for i, p in enumerate(p for n in range(T) for p in itertools.product(range(V), repeat=n))}
STATES = torch.tensor([[PREFIXES[tuple(s[:t])] for t in range(T)] for s in SEQUENCES.tolist()])  # [27, 3]
# Token 0 ends a sequence: what follows it is padding.
ENDS = (SEQUENCES == 0).int().cumsum(-1) - (SEQUENCES == 0).int()
MASK = ENDS == 0


def same(x: Tensor) -> Tensor:
    return x


@pytest.fixture
def world():
    """Logits, reference logits, rewards and values, all random, in float64."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    logits = random(len(PREFIXES), V).requires_grad_()
    # The reward depends on the visible part of a sequence alone.
    table = random(V + 1, V + 1, V + 1)
    visible = torch.where(MASK, SEQUENCES, V)
    rewards = table[visible[:, 0], visible[:, 1], visible[:, 2]]
    return logits, random(len(PREFIXES), V), rewards, random(len(PREFIXES))


def logprobs_of(logits: Tensor) -> Tensor:
    """Log-probs ``[27, 3]`` of every token, zero where a sequence has ended."""
    logp = logits.log_softmax(-1)[STATES].gather(-1, SEQUENCES[..., None]).squeeze(-1)
    return logp.masked_fill(~MASK, 0.0)


def probabilities(logits: Tensor) -> Tensor:
    """Of the 27 rows; rows that share their visible part share its probability."""
    uniform = torch.full((), 1 / V, dtype=torch.double).log()
    return (logprobs_of(logits) + torch.where(MASK, 0.0, uniform)).sum(-1).exp()


def algorithm(
    advantage, surrogate, beta: float = 0.0, place: str = "reward", estimator: str = "k1"
) -> Algorithm:
    return Algorithm(
        name="test",
        advantage=advantage,
        surrogate=surrogate,
        reduction=SequenceSum(constant=1.0),
        kl=KLPenalty(place, estimator, FixedCoefficient(beta)),
        update=MinibatchEpochs(1, 1, None),
        critic=Critic(0.0, None, 0, None),
        entropy_coef=0.0,
    )


def loss_of(algo: Algorithm, rows: list[int], world) -> Tensor:
    """The loss that the algorithm gives to a batch of these sequences."""
    logits, ref_logits, rewards, values = world
    logprobs = logprobs_of(logits)[rows]
    mask = MASK[rows]
    n = len(rows)
    rollout = Rollout(
        prompt_tokens=torch.zeros(n, 1, dtype=torch.long),
        prompt_lengths=torch.ones(n, dtype=torch.long),
        tokens=SEQUENCES[rows],
        lengths=mask.sum(-1),
        action_mask=mask,
        ended=torch.ones(n, dtype=torch.bool),
        group_ids=torch.zeros(n, dtype=torch.long),
        prompt_ids=torch.zeros(n, dtype=torch.long),
        logprobs=logprobs.detach(),
        ref_logprobs=logprobs_of(ref_logits)[rows],
        values=values[STATES][rows].masked_fill(~mask, 0.0),
        rewards=rewards[rows],
    )
    rollout = algo.estimate_advantages(algo.shape_rewards(rollout, algo.kl.controller.initial), same)
    states = STATES[rows]
    exact = kl.exact(logits.log_softmax(-1), ref_logits.log_softmax(-1))[states].masked_fill(~mask, 0.0)
    evaluation = Evaluation(logprobs, torch.zeros_like(logprobs), rollout.values, exact)
    terms = algo.loss_terms(rollout, evaluation)
    return algo.reduction(
        algo.loss(terms, algo.kl.controller.initial), mask, algo.reduction.denominator(mask).double()
    )


def expected_gradient(algo: Algorithm, world, batch: int) -> Tensor:
    """Minus the expected gradient of the loss over all batches of this size."""
    logits = world[0]
    p = probabilities(logits).detach()
    total = torch.zeros_like(logits)
    for rows in itertools.product(range(len(SEQUENCES)), repeat=batch):
        (gradient,) = torch.autograd.grad(loss_of(algo, list(rows), world), logits)
        total -= p[list(rows)].prod() * gradient
    return total


def true_gradient(world, beta: float = 0.0) -> Tensor:
    """Of ``E[reward] - beta KL(policy | reference)``."""
    logits, ref_logits, rewards, _ = world
    p = probabilities(logits)
    log_ratio = (logprobs_of(logits) - logprobs_of(ref_logits)).sum(-1)
    (gradient,) = torch.autograd.grad((p * (rewards - beta * log_ratio)).sum(), logits)
    return gradient


def test_probabilities_sum_to_one(world):
    torch.testing.assert_close(probabilities(world[0]).sum().item(), 1.0)


UNBIASED = {
    "reinforce": (ReturnToGo(1.0, "none", False), LogProb()),
    "ppo at ratio 1": (ReturnToGo(1.0, "none", False), ClippedRatio(0.2, 0.2)),
    "any critic, lambda 1": (GAE(1.0, 1.0, False), LogProb()),
}


@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("name", UNBIASED)
def test_unbiased(world, name, beta):
    """With the KL in the reward, the gradient is that of the penalized objective."""
    algo = algorithm(*UNBIASED[name], beta)
    torch.testing.assert_close(expected_gradient(algo, world, 1), true_gradient(world, beta))


def test_batch_mean_baseline_shrinks_by_its_known_factor(world):
    """A mean that includes the sequence itself: (B - 1) / B of the gradient, here a half."""
    algo = algorithm(ReturnToGo(1.0, "mean", False), LogProb())
    torch.testing.assert_close(expected_gradient(algo, world, 2), true_gradient(world) / 2)


def test_a_wrong_critic_biases_when_lambda_is_below_one(world):
    """The documented bias of GAE: the test above would notice a wrong estimator."""
    algo = algorithm(GAE(1.0, 0.5, False), LogProb())
    assert (expected_gradient(algo, world, 1) - true_gradient(world)).abs().max() > 0.01


def kl_gradient(world, estimator: str) -> Tensor:
    """Expected gradient of the penalty alone: the loss with it minus the loss without."""
    advantage, surrogate = ReturnToGo(1.0, "none", False), LogProb()
    with_kl = algorithm(advantage, surrogate, 0.3, "loss", estimator)
    return expected_gradient(with_kl, world, 1) - expected_gradient(algorithm(advantage, surrogate), world, 1)


def test_k2_in_the_loss_has_the_gradient_of_the_exact_kl(world):
    """Of the KL in the states that were visited; the effect on which states are visited is left out."""
    torch.testing.assert_close(kl_gradient(world, "k2"), kl_gradient(world, "exact"))


def test_near_the_reference_every_kl_in_the_loss_is_the_whole_penalty(world):
    """To first order in the distance, what is left out vanishes: it is a KL times a gradient."""
    logits, _, rewards, values = world
    near = logits.detach() + 1e-3 * torch.randn(logits.shape, dtype=torch.double, generator=torch.Generator())
    world = (logits, near, rewards, values)
    penalty = true_gradient(world, 0.3) - true_gradient(world, 0.0)
    for estimator in ("k2", "k3", "exact"):
        error = (kl_gradient(world, estimator) - penalty).norm() / penalty.norm()
        assert error < 0.02, estimator
