"""The pure maths, against hand-computed literals and identities."""

from __future__ import annotations

import math

import pytest
import torch

from policylab.functional import kl
from policylab.functional.advantages import discounted_returns, explained_variance, gae, subtract_batch_mean
from policylab.functional.logprobs import completion_slice, entropy, log_distribution, token_logprobs
from policylab.functional.masks import last_position, length_mask, masked_moments, masked_sum, whiten
from policylab.functional.reduction import sequence_mean_sum, token_sum
from policylab.functional.surrogates import clipped, clipped_ratio_loss, logprob_loss, value_loss


def same(x):
    """One process: the sum over processes is the tensor itself."""
    return x


MASK = torch.tensor([[True, True, True], [True, True, False]])


class TestMasks:
    def test_length_mask(self):
        assert length_mask(torch.tensor([0, 2]), 3).tolist() == [[False] * 3, [True, True, False]]

    def test_masked_sum_ignores_nan_outside(self):
        x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, math.nan]])
        assert masked_sum(x, MASK).tolist() == [6.0, 9.0]

    def test_last_position_of_a_row_without_actions_is_nowhere(self):
        mask = torch.tensor([[True, False, True, False], [False] * 4])
        assert last_position(mask).tolist() == [[False, False, True, False], [False] * 4]

    def test_moments_by_hand(self):
        # 1, 2, 3, 4, 5: mean 3, population variance (4 + 1 + 0 + 1 + 4) / 5 = 2
        x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
        mean, variance = masked_moments(x, MASK, same)
        assert (mean.item(), variance.item()) == (3.0, 2.0)

    def test_whiten_by_hand(self):
        x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0]])
        expected = torch.tensor([[-2.0, -1.0, 0.0], [1.0, 2.0, 0.0]]) / math.sqrt(2)
        torch.testing.assert_close(whiten(x, MASK, same), expected)

    @pytest.mark.parametrize("mask", [MASK, torch.zeros_like(MASK)])
    def test_whiten_without_spread_or_actions_is_zero(self, mask):
        assert whiten(torch.full((2, 3), 7.0), mask, same).tolist() == [[0.0] * 3] * 2


class TestLogProbs:
    def test_shift_by_one(self):
        # prompt a b, completion c d: b's logits choose c, c's choose d
        assert ["a", "b", "c", "d"][completion_slice(2, 2)] == ["b", "c"]

    def test_token_logprobs_by_hand(self):
        logp = log_distribution(torch.tensor([[0.0, math.log(3.0)]]), 1.0)  # probabilities 1/4 and 3/4
        torch.testing.assert_close(token_logprobs(logp, torch.tensor([1])), torch.tensor([math.log(0.75)]))

    def test_temperature_divides_the_logits(self):
        logp = log_distribution(torch.tensor([[0.0, 2 * math.log(3.0)]]), 2.0)
        torch.testing.assert_close(logp.exp(), torch.tensor([[0.25, 0.75]]))

    def test_entropy_by_hand(self):
        logp = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.75, 0.0]]).log()
        expected = [math.log(2), -0.25 * math.log(0.25) - 0.75 * math.log(0.75)]
        torch.testing.assert_close(entropy(logp), torch.tensor(expected))

    def test_entropy_of_uniform_is_log_of_size(self):
        torch.testing.assert_close(
            entropy(log_distribution(torch.zeros(1, 7), 1.0)), torch.tensor([math.log(7)])
        )


class TestKL:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()

    def test_estimators_by_hand(self):
        # token 0: log ratio q/p = log(1/2)
        p, q = self.p[:, :1], self.q[:, :1]
        assert kl.k1(p, q).item() == pytest.approx(math.log(2))
        assert kl.k2(p, q).item() == pytest.approx(0.5 * math.log(2) ** 2)
        assert kl.k3(p, q).item() == pytest.approx(0.5 - 1 + math.log(2))

    def test_exact_by_hand(self):
        # 0.5 log(0.5 / 0.25) + 0.5 log(0.5 / 0.75)
        expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
        assert kl.exact(self.p, self.q).item() == pytest.approx(expected)

    @pytest.mark.parametrize("name", ["k1", "k3"])
    def test_expectation_over_samples_is_the_exact_kl(self, name):
        torch.manual_seed(0)
        p, q = torch.randn(1, 5).log_softmax(-1), torch.randn(1, 5).log_softmax(-1)
        expectation = (p.exp() * kl.SAMPLED[name](p, q)).sum(-1)
        torch.testing.assert_close(expectation, kl.exact(p, q))

    def test_gradient_of_k2_is_that_of_the_exact_kl(self):
        torch.manual_seed(0)
        logits, q = torch.randn(1, 5, requires_grad=True), torch.randn(1, 5).log_softmax(-1)
        p = logits.log_softmax(-1)
        (sampled,) = torch.autograd.grad((p.detach().exp() * kl.k2(p, q)).sum(), logits, retain_graph=True)
        (true,) = torch.autograd.grad(kl.exact(p, q).sum(), logits)
        torch.testing.assert_close(sampled, true)

    def test_equal_distributions_are_at_zero(self):
        for estimate in (*kl.SAMPLED.values(), kl.exact):
            assert estimate(self.p, self.p).abs().max() == 0

    def test_impossible_tokens_add_nothing(self):
        p = torch.tensor([[1.0, 0.0]]).log()
        assert kl.exact(p, self.q).item() == pytest.approx(math.log(4))
        assert kl.exact(p, p).item() == 0


class TestReturns:
    def test_discounted_by_hand(self):
        rewards = torch.tensor([[1.0, 2.0, 4.0]])
        # 4; 2 + 4/2 = 4; 1 + 4/2 = 3
        assert discounted_returns(rewards, torch.ones(1, 3).bool(), 0.5).tolist() == [[3.0, 4.0, 4.0]]

    def test_positions_of_others_are_skipped(self):
        mask = torch.tensor([[True, False, True]])
        # the middle is an environment's word: one discount between the two actions, not two
        assert discounted_returns(torch.tensor([[1.0, 9.0, 4.0]]), mask, 0.5).tolist() == [[3.0, 0.0, 4.0]]

    def test_batch_mean_by_hand(self):
        returns = torch.tensor([[3.0, 2.0, 1.0], [5.0, 4.0, 0.0]])
        # whole returns 3 and 5, mean 4
        expected = [[-1.0, -2.0, -3.0], [1.0, 0.0, 0.0]]
        assert subtract_batch_mean(returns, MASK, same).tolist() == expected


class TestGAE:
    rewards = torch.tensor([[0.0, 0.0, 1.0]])
    values = torch.tensor([[0.5, 0.25, 0.75]])
    mask = torch.ones(1, 3).bool()

    def test_by_hand(self):
        # gamma 0.9, lam 0.8; deltas: 0.9*0.25-0.5 = -0.275; 0.9*0.75-0.25 = 0.425; 1-0.75 = 0.25
        # A2 = 0.25; A1 = 0.425 + 0.72*0.25 = 0.605; A0 = -0.275 + 0.72*0.605 = 0.1606
        result = gae(self.rewards, self.values, self.mask, 0.9, 0.8)
        torch.testing.assert_close(result, torch.tensor([[0.1606, 0.605, 0.25]]))

    def test_one_one_is_return_minus_value(self):
        expected = discounted_returns(self.rewards, self.mask, 1.0) - self.values
        torch.testing.assert_close(gae(self.rewards, self.values, self.mask, 1.0, 1.0), expected)

    def test_zero_is_the_td_residual(self):
        torch.testing.assert_close(
            gae(self.rewards, self.values, self.mask, 1.0, 0.0), torch.tensor([[-0.25, 0.5, 0.25]])
        )

    def test_padding_and_gaps_change_nothing(self):
        plain = gae(self.rewards, self.values, self.mask, 0.9, 0.8)
        spread = [0, 2, 3]
        rewards, values = torch.full((1, 6), 7.0), torch.full((1, 6), 9.0)
        mask = torch.zeros(1, 6).bool()
        rewards[:, spread], values[:, spread], mask[:, spread] = self.rewards, self.values, True
        result = gae(rewards, values, mask, 0.9, 0.8)
        torch.testing.assert_close(result[:, spread], plain)
        assert result[~mask].abs().max() == 0


class TestExplainedVariance:
    def test_by_hand(self):
        returns, values = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0, 2.0, 2.0]])
        # residuals 0, 0, 1: variance 2/9; returns: variance 2/3; 1 - 1/3
        mask = torch.ones(1, 3).bool()
        assert explained_variance(values, returns, mask, same).item() == pytest.approx(2 / 3)

    def test_returns_without_spread(self):
        x = torch.ones(1, 3)
        assert explained_variance(x, x, x.bool(), same).item() == 0


class TestSurrogates:
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    old = torch.zeros(1, 4)
    new = torch.tensor([[1.5, 1.5, 0.5, 0.5]]).log()  # ratios

    def test_clipped_ratio_by_hand(self):
        # A > 0: min(1.5, 1.2) and min(0.5, 0.8); A < 0: min(-1.5, -1.2) and min(-0.5, -0.8)
        loss = clipped_ratio_loss(self.new, self.old, self.advantages, 0.2, 0.2)
        torch.testing.assert_close(loss, torch.tensor([[-1.2, 1.5, -0.5, 0.8]]))
        assert clipped(self.new, self.old, self.advantages, 0.2, 0.2).tolist() == [[1.0, 0.0, 0.0, 1.0]]

    def test_the_two_bounds_are_apart(self):
        loss = clipped_ratio_loss(self.new, self.old, self.advantages, 0.4, 0.1)
        torch.testing.assert_close(loss, torch.tensor([[-1.1, 1.5, -0.5, 0.6]]))

    def test_clipped_tokens_have_no_gradient(self):
        new = self.new.clone().requires_grad_()
        clipped_ratio_loss(new, self.old, self.advantages, 0.2, 0.2).sum().backward()
        assert (new.grad == 0).tolist() == [[True, False, False, True]]

    def test_at_ratio_one_the_gradient_is_reinforce(self):
        new = torch.randn(1, 4, requires_grad=True)
        old = new.detach().clone()
        (ppo,) = torch.autograd.grad(clipped_ratio_loss(new, old, self.advantages, 0.2, 0.2).sum(), new)
        (reinforce,) = torch.autograd.grad(logprob_loss(new, self.advantages).sum(), new)
        torch.testing.assert_close(ppo, reinforce)

    def test_value_loss_by_hand(self):
        values, old, returns = torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[3.0]])
        assert value_loss(values, old, returns, None).item() == 0.5
        # held within 0.5 of the old value: (0.5 - 3)^2 / 2, the larger of the two
        assert value_loss(values, old, returns, 0.5).item() == 3.125


class TestReduction:
    x = torch.tensor([[1.0, 2.0, 3.0], [4.0, 6.0, math.nan]])

    def test_token_mean_by_hand(self):
        assert token_sum(self.x, MASK, torch.tensor(5.0)).item() == pytest.approx(16 / 5)

    def test_sequence_mean_by_hand(self):
        assert sequence_mean_sum(self.x, MASK, torch.tensor(2.0)).item() == pytest.approx((2 + 5) / 2)

    @pytest.mark.parametrize("reduce", [token_sum, sequence_mean_sum])
    def test_cutting_changes_nothing(self, reduce):
        denominator = torch.tensor(5.0)
        parts = sum(reduce(self.x[i : i + 1], MASK[i : i + 1], denominator) for i in range(2))
        torch.testing.assert_close(parts, reduce(self.x, MASK, denominator))
