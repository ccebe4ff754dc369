"""The pure functions, against hand-computed numbers and identities."""

from __future__ import annotations

import math

import pytest
import torch

from policylab.functional import kl
from policylab.functional.logprobs import completion_slice, entropy, log_distribution, token_logprobs
from policylab.functional.masks import last_position, length_mask, masked_moments, masked_sum, whiten
from policylab.functional.reduction import sequence_mean_sum, token_sum


def same(x):
    """The sum over processes, with one process."""
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

    def test_k3_stays_finite_however_unlikely_the_token(self):
        """Beyond a log-ratio of 20 it is its tangent: e^20 - 1 - 20 + (e^20 - 1) (90 - 20)."""
        p = torch.tensor([[-91.0, -21.0, -1.0]], requires_grad=True)
        value = kl.k3(p, torch.full_like(p, -1.0))
        far, at = 71 * math.expm1(20.0) - 20, math.expm1(20.0) - 20
        torch.testing.assert_close(value, torch.tensor([[far, at, 0.0]]))
        (gradient,) = torch.autograd.grad(value.sum(), p)
        assert gradient[0, 0].item() == pytest.approx(-math.expm1(20.0), rel=1e-6)  # towards the reference
        assert gradient[0, 2] == 0
        assert kl.k3(torch.tensor([[-1.0]]), torch.tensor([[-torch.inf]])).item() == math.inf

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
