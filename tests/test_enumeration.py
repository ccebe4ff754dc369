"""Exact expected gradients, by enumerating all completions of length 3 over a vocabulary of 3.

The expected gradient of an estimator is the sum over all batches of probability x gradient of its loss. For an unbiased
estimator it equals the gradient of the expected reward, which autograd computes without sampling. For a biased one it
equals the gradient of the objective that theory gives.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

import enumeration
import estimator_variance
from enumeration import (
    COMPLETIONS,
    LENGTHS,
    MASK,
    World,
    algorithm,
    expected_gradient,
    logprobs_of,
    occupancy,
    one_process,
    penalty,
    probabilities,
    true_gradient,
)
from policylab.algorithms import (
    CISPO,
    GAE,
    BestOfGroup,
    ClippedRatio,
    GreedyBaseline,
    GroupBaseline,
    LeaveOneOut,
    LogProb,
    NStep,
    Ratio,
    ReturnToGo,
    SequenceMean,
    SequenceRatio,
    SequenceSum,
    TokenMean,
    VTrace,
)
from policylab.data.rollout import Rollout

PLAIN = ReturnToGo(1.0, "none", False)
FREE = math.inf  # a bound that is never reached

close = torch.testing.assert_close


@pytest.fixture
def world() -> World:
    """A world with random logits, reference, rewards and critic."""
    return World.random()


@pytest.fixture
def off_policy(world) -> World:
    """The same world, with another policy that samples."""
    return world.replace(sampler=World.random(seed=1).logits.detach())


def distance(gradient: Tensor, truth: Tensor) -> float:
    """Distance of a gradient from the true one, relative to the length of the true one."""
    return float((gradient - truth).norm() / truth.norm())


def gradient_of(objective: Tensor, world: World) -> Tensor:
    return torch.autograd.grad(objective, world.logits)[0]


def rewarded(world: World, beta: float = 0.0) -> Rollout:
    """All completions with their token rewards."""
    return algorithm(PLAIN, kl=penalty(beta)).shape_rewards(world.table(), beta)


def local_objective(world: World, action_values: Tensor) -> Tensor:
    """``sum_s d(s) sum_a pi(a | s) Q(s, a)``: the policy chooses the actions, but the sampler decides which states are
    visited. TRPO's approximation, arXiv:1502.05477, eq. 3."""
    return (
        occupancy(world.sampling_logits)[:, None] * world.logits.softmax(-1) * action_values.detach()
    ).sum()


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_batches_are_all_there(world, size):
    """The 27 strings of three tokens, cut after an EOS, give 15 completions, and 15^n ordered batches."""
    rows, orders = enumeration.batches(size)
    assert orders.sum() == len(COMPLETIONS) ** size
    close((orders * probabilities(world.logits)[rows].prod(-1)).sum().item(), 1.0)


@pytest.fixture
def any_combination(monkeypatch):
    """Allows refused combinations, to show why they are refused."""
    monkeypatch.setattr("policylab.algorithms.algorithm.check_combination", lambda *_: None)


class TestUnbiased:
    """The expected gradient is that of the expected reward, including the KL in the reward."""

    ESTIMATORS = (
        pytest.param(PLAIN, 1, id="return to go"),
        pytest.param(GreedyBaseline(), 1, id="greedy baseline"),
        pytest.param(LeaveOneOut(), 2, id="leave one out"),
        pytest.param(LeaveOneOut(), 4, id="leave one out of four"),
        pytest.param(GAE(1.0, 1.0, False), 1, id="any critic, lambda 1"),
        pytest.param(NStep(1.0, 3, False), 1, id="any critic, n as long as the sequence"),
        pytest.param(VTrace(1.0, FREE, FREE, False), 1, id="v-trace"),
        pytest.param(VTrace(1.0, 1.0, 1.0, False), 1, id="v-trace on policy, whatever its clips"),
    )

    @pytest.mark.parametrize("beta", [0.0, 0.3])
    @pytest.mark.parametrize(("advantage", "size"), ESTIMATORS)
    def test_advantages(self, world, advantage, size, beta):
        algo = algorithm(advantage, kl=penalty(beta))
        close(expected_gradient(algo, world, size), true_gradient(world, beta))

    @pytest.mark.parametrize(
        "surrogate",
        [
            ClippedRatio(0.2, 0.2, None),
            ClippedRatio(0.2, 0.2, 3.0),
            Ratio(),
            CISPO(None, 3.0),
            CISPO(0.2, 0.2),
        ],
        ids=repr,
    )
    @pytest.mark.parametrize("beta", [0.0, 0.3])
    def test_surrogates_at_ratio_one(self, world, surrogate, beta):
        algo = algorithm(PLAIN, surrogate, kl=penalty(beta))
        close(expected_gradient(algo, world, 1), true_gradient(world, beta))

    @pytest.mark.parametrize("beta", [0.0, 0.3])
    def test_sequence_ratio_at_ratio_one(self, world, beta):
        """With one credit per sequence, and the sum over its tokens instead of the paper's mean."""
        algo = algorithm(LeaveOneOut(), SequenceRatio(3e-4, 4e-4), kl=penalty(beta))
        close(expected_gradient(algo, world, 2), true_gradient(world, beta))

    @pytest.mark.parametrize("advantage", [GAE(1.0, 0.5, False), GAE(1.0, 0.0, False), NStep(1.0, 2, False)])
    def test_a_perfect_critic_biases_nothing(self, world, advantage):
        perfect = world.replace(values=world.true_values())
        close(expected_gradient(algorithm(advantage), perfect, 1), true_gradient(world))

    @pytest.mark.parametrize("advantage", [PLAIN, GreedyBaseline(), GAE(1.0, 1.0, False)], ids=repr)
    def test_exact_kl_in_the_reward(self, world, advantage):
        algo = algorithm(advantage, kl=penalty(0.3, estimator="exact"))
        close(expected_gradient(algo, world, 1), true_gradient(world, 0.3))


class TestKnownFactor:
    @pytest.mark.parametrize("size", [2, 3, 4])
    @pytest.mark.parametrize("advantage", [GroupBaseline(normalize=False), ReturnToGo(1.0, "mean", False)])
    def test_a_mean_that_includes_the_sequence(self, world, advantage, size):
        """(G - 1) / G of the gradient, and the same direction."""
        gradient = expected_gradient(algorithm(advantage), world, size)
        close(gradient, true_gradient(world) * (size - 1) / size)


class TestBiasOfAdvantages:
    def test_group_standard_deviation_in_pairs_is_a_ranking(self, world):
        """In a group of two only the sign of the difference remains: the objective is the probability to win against
        another sample, ``P(r > r') - P(r < r')``, not the reward. The size of the reward is lost."""
        p = probabilities(world.logits)
        wins = (world.rewards[:, None] - world.rewards).sign() @ p.detach()
        gradient = expected_gradient(algorithm(GroupBaseline(normalize=True)), world, 2)
        close(gradient, gradient_of((p * wins).sum(), world) / math.sqrt(2), rtol=1e-4, atol=1e-5)
        assert distance(gradient / gradient.norm(), true_gradient(world) / true_gradient(world).norm()) > 0.1

    @pytest.mark.parametrize("size", [2, 3])
    def test_best_of_group_imitates_the_best_of_n(self, world, size):
        """The expected gradient is that of the log-likelihood of the best of n samples, held fixed, without the groups
        that consist of n equal completions, in which none is selected."""
        p = probabilities(world.logits).detach()
        # P(the best of n is x) = P(all n at most as good) - P(all n worse)
        at_most = (world.rewards[:, None] >= world.rewards).double() @ p
        selected = at_most**size - (at_most - p) ** size - p**size
        objective = (selected * logprobs_of(world.logits).sum(-1)).sum()
        gradient = expected_gradient(algorithm(BestOfGroup()), world, size)
        close(gradient, gradient_of(objective, world))

    @pytest.mark.parametrize("advantage", [GAE(1.0, 0.0, False), NStep(1.0, 1, False)], ids=repr)
    def test_the_bias_of_a_wrong_critic(self, world, advantage):
        """lambda 0, n 1: the critic's value of the next state replaces all later rewards."""
        believed = local_objective(world, world.action_values(world.values))
        gradient = expected_gradient(algorithm(advantage), world, 1)
        close(gradient, gradient_of(believed, world))
        assert distance(gradient, true_gradient(world)) > 0.1

    def test_the_bias_of_a_wrong_critic_falls_with_lambda_and_n(self, world):
        def bias(advantage):
            return distance(expected_gradient(algorithm(advantage), world, 1), true_gradient(world))

        of_lambda = [bias(GAE(1.0, lam, False)) for lam in (0.0, 0.5, 0.95, 1.0)]
        of_n = [bias(NStep(1.0, n, False)) for n in (1, 2, 3)]
        assert of_lambda == sorted(of_lambda, reverse=True)
        assert of_n == sorted(of_n, reverse=True)
        assert of_lambda[-1] < 1e-12
        assert of_n[-1] < 1e-12

    @pytest.mark.parametrize(
        "advantage", [ReturnToGo(1.0, "none", True), GAE(1.0, 1.0, True), NStep(1.0, 3, True)], ids=repr
    )
    def test_whitening_couples_the_sequences_of_a_batch(self, world, advantage):
        """The mean and the variance include the sample itself, token by token, which changes the direction: the less,
        the larger the batch."""
        truth = true_gradient(world)
        gradients = [expected_gradient(algorithm(advantage), world, size) for size in (2, 3, 4)]
        cosines = [float((g * truth).sum() / g.norm() / truth.norm()) for g in gradients]
        assert cosines == sorted(cosines)
        assert cosines[-1] < 0.99

    @pytest.mark.usefixtures("any_combination")
    def test_one_credit_per_sequence_omits_part_of_the_exact_kl(self, world):
        """Exact KL in the reward charges an action with its own k1 and with the expected KL of later actions. The sum
        over the sequence contains only the k1 of the first action, so the k1 of all others is missing."""
        algo = algorithm(LeaveOneOut(), kl=penalty(0.3, estimator="exact"))
        assert distance(expected_gradient(algo, world, 2), true_gradient(world, 0.3)) > 0.05


class TestBiasOfReductions:
    @pytest.mark.parametrize("reduction", [SequenceMean(), TokenMean()])
    def test_the_mean_over_tokens_climbs_reward_over_length(self, world, reduction):
        """For one sequence. A long bad sequence is punished less than a short bad one, so lengths grow."""
        objective = (probabilities(world.logits) * world.rewards / LENGTHS).sum()
        gradient = expected_gradient(algorithm(PLAIN, reduction=reduction), world, 1)
        close(gradient, gradient_of(objective, world))
        assert distance(gradient, true_gradient(world)) > 0.1

    def test_sequence_mean_does_so_in_every_batch(self, world):
        objective = (probabilities(world.logits) * world.rewards / LENGTHS).sum()
        algo = algorithm(PLAIN, reduction=SequenceMean())
        close(expected_gradient(algo, world, 3), gradient_of(objective, world))

    def test_the_constant_divides(self, world):
        algo = algorithm(PLAIN, reduction=SequenceSum(constant=4.0))
        close(expected_gradient(algo, world, 1), true_gradient(world) / 4)


class TestOffPolicy:
    """One policy samples, another one is trained."""

    @pytest.mark.parametrize("surrogate", [Ratio(), CISPO(None, 1e9), ClippedRatio(1.0, 1e9, None)], ids=repr)
    def test_a_ratio_climbs_the_local_objective(self, off_policy, surrogate):
        """The ratio corrects each action, but not the states that it leads to: TRPO's surrogate, with the sampler's
        values."""
        sampler = off_policy.replace(logits=off_policy.sampling_logits)
        objective = local_objective(off_policy, off_policy.action_values(sampler.true_values()))
        gradient = expected_gradient(algorithm(PLAIN, surrogate), off_policy, 1)
        close(gradient, gradient_of(objective, off_policy))
        assert distance(gradient, true_gradient(off_policy)) > 0.1

    @pytest.mark.parametrize("dual_clip", [None, 2.0])
    def test_clipping_leaves_out_the_tokens_that_it_reports(self, off_policy, dual_clip):
        surrogate = ClippedRatio(0.2, 0.2, dual_clip)
        new, old = logprobs_of(off_policy.logits), logprobs_of(off_policy.sampling_logits)
        credit = off_policy.rewards[:, None].expand_as(new)
        heard = 1 - surrogate.clipped(new.detach(), old, credit, MASK)
        sampled = probabilities(off_policy.sampling_logits)[:, None] * MASK
        objective = (sampled * heard * (new - old).exp() * credit).sum()
        gradient = expected_gradient(algorithm(PLAIN, surrogate), off_policy, 1)
        close(gradient, gradient_of(objective, off_policy))
        assert distance(gradient, expected_gradient(algorithm(PLAIN, Ratio()), off_policy, 1)) > 0.1

    def test_the_dual_clip_removes_more_gradients(self, off_policy):
        new, old = logprobs_of(off_policy.logits), logprobs_of(off_policy.sampling_logits)
        credit = off_policy.rewards[:, None].expand_as(new)
        plain, dual = (ClippedRatio(0.2, 0.2, bound).clipped(new, old, credit, MASK) for bound in (None, 2.0))
        assert (dual >= plain).all()
        assert dual.sum() > plain.sum()

    @pytest.mark.usefixtures("any_combination")
    def test_sequence_ratio_averages_credits(self, world):
        """Credits that differ within a sequence are averaged, which is not the policy gradient."""
        credit = PLAIN(rewarded(world, 0.3), one_process).advantages.sum(-1) / LENGTHS
        p = probabilities(world.logits)
        algo = algorithm(PLAIN, SequenceRatio(3e-4, 4e-4), kl=penalty(0.3))
        gradient = expected_gradient(algo, world, 1)
        close(gradient, gradient_of((p * credit).sum(), world))
        assert distance(gradient, true_gradient(world, 0.3)) > 0.05

    def test_vtrace_values_the_trained_policy(self, off_policy):
        """Without clips, ``v`` of the first action is an unbiased estimate of the trained policy's value, for any
        critic."""
        targets = VTrace(1.0, FREE, FREE, False)(rewarded(off_policy), one_process).returns
        expected = probabilities(off_policy.sampling_logits) @ targets[:, 0]
        close(expected, off_policy.true_values()[0])

    def test_vtrace_climbs_the_local_objective_of_the_trained_policy(self, off_policy):
        """Action and value are corrected, the visited states are not (arXiv:1802.01561, section 4.2)."""
        objective = local_objective(off_policy, off_policy.action_values(off_policy.true_values()))
        gradient = expected_gradient(algorithm(VTrace(1.0, FREE, FREE, False)), off_policy, 1)
        close(gradient, gradient_of(objective, off_policy))

    def test_clipped_vtrace_values_a_policy_between_the_two(self, off_policy):
        """``pi_rho(a) ~ min(rho_clip mu(a), pi(a))``: its values are the fixed point (arXiv:1802.01561, eq. 3)."""
        mu, pi = off_policy.sampling_logits.softmax(-1), off_policy.logits.softmax(-1)
        between = torch.minimum(0.8 * mu, pi).log().detach()
        values = off_policy.replace(logits=between).true_values()
        rollout = rewarded(off_policy.replace(values=values))
        targets = VTrace(1.0, 0.8, 0.5, False)(rollout, one_process).returns
        close(probabilities(off_policy.sampling_logits) @ targets[:, 0], values[0])


class TestKLInTheLoss:
    def gradient(self, world, estimator: str) -> Tensor:
        """Expected gradient of the penalty alone: of the loss with it minus the loss without it."""
        with_kl = expected_gradient(algorithm(PLAIN, kl=penalty(0.3, "loss", estimator)), world, 1)
        return with_kl - expected_gradient(algorithm(PLAIN), world, 1)

    def test_k2_has_the_gradient_of_the_exact_kl(self, world):
        """Of the KL in the visited states; the effect on which states are visited is ignored."""
        close(self.gradient(world, "k2"), self.gradient(world, "exact"))

    def test_near_the_reference_all_are_the_whole_penalty(self, world):
        """The ignored part is a KL times a gradient, so it vanishes to first order in the distance."""
        noise = torch.randn(world.logits.shape, dtype=torch.double, generator=torch.Generator())
        world = world.replace(ref_logits=world.logits.detach() + 1e-3 * noise)
        whole = true_gradient(world, 0.3) - true_gradient(world)
        for estimator in ("k2", "k3", "exact"):
            assert distance(self.gradient(world, estimator), whole) < 0.02, estimator


def test_logprob_reads_no_ratio(off_policy):
    """REINFORCE is not corrected off policy: its objective is weighted by the sampler's probabilities."""
    objective = (probabilities(off_policy.sampling_logits) * off_policy.rewards) @ logprobs_of(
        off_policy.logits
    ).sum(-1)
    close(expected_gradient(algorithm(PLAIN, LogProb()), off_policy, 1), gradient_of(objective, off_policy))


@pytest.mark.slow
def test_the_table_in_the_docs_is_what_the_script_prints():
    page = (Path(__file__).parent.parent / "docs" / "estimators.md").read_text()
    assert estimator_variance.table() in page
