"""Surrogates: hand-computed numbers, identities, and the tokens that lose their gradient at a bound."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import policylab.algorithms
from policylab.algorithms import CISPO, ClippedRatio, LogProb, Ratio, SequenceMean, SequenceRatio, Surrogate
from policylab.errors import UserError
from policylab.functional.surrogates import value_loss

ALL = (
    LogProb(),
    Ratio(),
    ClippedRatio(0.2, 0.2, None),
    ClippedRatio(0.4, 0.1, 2.0),
    SequenceRatio(3e-4, 4e-4),
    CISPO(None, 3.0),
    CISPO(0.2, 0.2),
)
every = pytest.mark.parametrize("surrogate", ALL, ids=repr)
close = torch.testing.assert_close


def logs(*ratios: float) -> Tensor:
    """Log-probs with these ratios to log-probs of zero."""
    return torch.tensor([ratios]).log()


def loss(surrogate: Surrogate, new: Tensor, advantages: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones(new.shape, dtype=torch.bool) if mask is None else mask
    return surrogate.loss(new, torch.zeros_like(new), advantages, mask)


def clipped(surrogate: Surrogate, new: Tensor, advantages: Tensor) -> list[list[float]]:
    mask = torch.ones(new.shape, dtype=torch.bool)
    return surrogate.clipped(new, torch.zeros_like(new), advantages, mask).tolist()


def gradient(surrogate: Surrogate, new: Tensor, advantages: Tensor) -> Tensor:
    new = new.clone().requires_grad_()
    return torch.autograd.grad(loss(surrogate, new, advantages).sum(), new)[0]


class TestClippedRatio:
    new = logs(1.5, 1.5, 0.5, 0.5)
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])

    def test_by_hand(self):
        # A > 0: min(1.5, 1.2) and min(0.5, 0.8); A < 0: min(-1.5, -1.2) and min(-0.5, -0.8)
        surrogate = ClippedRatio(0.2, 0.2, None)
        close(loss(surrogate, self.new, self.advantages), torch.tensor([[-1.2, 1.5, -0.5, 0.8]]))
        assert clipped(surrogate, self.new, self.advantages) == [[1.0, 0.0, 0.0, 1.0]]

    def test_the_two_bounds_are_independent(self):
        surrogate = ClippedRatio(0.4, 0.1, None)
        close(loss(surrogate, self.new, self.advantages), torch.tensor([[-1.1, 1.5, -0.5, 0.6]]))

    def test_dual_clip_by_hand(self):
        # ratio 5: A = -2 costs at most 3 * 2 = 6, not 10; A = 2 earns 1.2 * 2 = 2.4 as before
        new, advantages = logs(5.0, 5.0, 2.0), torch.tensor([[-2.0, 2.0, -2.0]])
        surrogate = ClippedRatio(0.2, 0.2, 3.0)
        close(loss(surrogate, new, advantages), torch.tensor([[6.0, -2.4, 4.0]]))
        assert clipped(surrogate, new, advantages) == [[1.0, 1.0, 0.0]]

    def test_a_large_dual_clip_is_none(self):
        torch.manual_seed(0)
        new, advantages = torch.randn(4, 9), torch.randn(4, 9)
        plain, dual = ClippedRatio(0.2, 0.2, None), ClippedRatio(0.2, 0.2, 1e6)
        close(loss(dual, new, advantages), loss(plain, new, advantages))
        assert clipped(dual, new, advantages) == clipped(plain, new, advantages)

    @pytest.mark.parametrize("dual_clip", [None, 1.3])
    def test_it_is_the_formula_of_the_paper(self, dual_clip):
        torch.manual_seed(0)
        new, advantages = torch.randn(4, 9), torch.randn(4, 9)
        ratio = new.exp()
        objective = torch.minimum(ratio * advantages, ratio.clamp(0.7, 1.1) * advantages)
        if dual_clip is not None:
            bounded = torch.maximum(objective, dual_clip * advantages)
            objective = torch.where(advantages < 0, bounded, objective)
        close(loss(ClippedRatio(0.3, 0.1, dual_clip), new, advantages), -objective)

    @pytest.mark.parametrize("dual_clip", [1.0, 0.5])
    def test_a_dual_clip_below_one_is_refused(self, dual_clip):
        with pytest.raises(UserError, match=r"algo\.surrogate\.dual_clip is .*; it must be above 1"):
            ClippedRatio(0.2, 0.2, dual_clip)


class TestRatio:
    def test_by_hand(self):
        # ratios 3/2 and 1/2: -3/2 * 2; -1/2 * -4
        close(loss(Ratio(), logs(1.5, 0.5), torch.tensor([[2.0, -4.0]])), torch.tensor([[-3.0, 2.0]]))

    def test_nothing_is_clipped(self):
        assert clipped(Ratio(), logs(9.0, 0.1), torch.tensor([[1.0, -1.0]])) == [[0.0, 0.0]]


class TestSequenceRatio:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    # ratios 4 and 1/4 (mean of the logs 0, s = 1); 2, 2, 2 (s = 2)
    new = torch.tensor([[4.0, 0.25, 9.0], [2.0, 2.0, 2.0]]).log()

    def test_by_hand(self):
        # s = 1: -1 * 3 at both tokens; s = 2 cut to 1.5: -1.5 * 1
        advantages = torch.tensor([[3.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
        surrogate = SequenceRatio(0.5, 0.5)
        expected = torch.tensor([[-3.0, -3.0, 0.0], [-1.5, -1.5, -1.5]])
        close(loss(surrogate, self.new, advantages, self.mask), expected)
        silenced = surrogate.clipped(self.new, torch.zeros(2, 3), advantages, self.mask)
        assert silenced.tolist() == [[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]

    def test_the_mean_over_the_sequence_has_the_gradient_of_the_paper(self):
        # d/d log pi(y_t) of -s A is -s A / |y|: with s = 2, A = -3, |y| = 3: 2
        new = logs(2.0, 2.0, 2.0).requires_grad_()
        reduction, mask = SequenceMean(), torch.ones(1, 3, dtype=torch.bool)
        value = reduction(
            loss(SequenceRatio(0.2, 9.0), new, torch.full((1, 3), -3.0)), mask, reduction.denominator(mask)
        )
        assert value.item() == pytest.approx(6.0)
        close(torch.autograd.grad(value, new)[0], torch.full((1, 3), 2.0))

    def test_masked_values_change_neither_loss_nor_gradient(self):
        new = self.new.masked_fill(~self.mask, math.nan).requires_grad_()
        old = torch.zeros(2, 3).masked_fill(~self.mask, math.nan)
        advantages = torch.ones(2, 3).masked_fill(~self.mask, math.nan)
        per_token = SequenceRatio(0.9, 9.0).loss(new, old, advantages, self.mask)
        reduction = SequenceMean()
        value = reduction(per_token, self.mask, reduction.denominator(self.mask))
        # s = 1 and 2: the mean of -1 and -2
        assert value.item() == pytest.approx(-1.5)
        (result,) = torch.autograd.grad(value, new)
        close(result, torch.tensor([[-0.25, -0.25, 0.0], [-1 / 3, -1 / 3, -1 / 3]]))

    def test_a_sequence_without_actions(self):
        new = torch.zeros(1, 3, requires_grad=True)
        mask = torch.zeros(1, 3, dtype=torch.bool)
        value = loss(SequenceRatio(0.1, 0.1), new, torch.zeros(1, 3), mask).sum()
        assert value.item() == 0
        assert (torch.autograd.grad(value, new)[0] == 0).all()


class TestCISPO:
    new = logs(6.0, 0.5)
    advantages = torch.tensor([[2.0, -1.0]])

    def test_by_hand(self):
        # weights min(6, 4) = 4 and 1/2: -4 * 2 * log 6; 1/2 * log(1/2)
        expected = torch.tensor([[-8 * math.log(6), 0.5 * math.log(0.5)]])
        close(loss(CISPO(None, 3.0), self.new, self.advantages), expected)

    def test_the_lower_bound(self):
        # max(1/2, 0.8)
        close(loss(CISPO(0.2, 3.0), self.new, self.advantages)[0, 1].item(), 0.8 * math.log(0.5))

    def test_a_token_at_a_bound_keeps_its_gradient(self):
        # -w A: -4 * 2 and 1/2; the cut is still reported
        close(gradient(CISPO(None, 3.0), self.new, self.advantages), torch.tensor([[-8.0, 0.5]]))
        assert clipped(CISPO(None, 3.0), self.new, self.advantages) == [[1.0, 0.0]]
        assert clipped(CISPO(0.2, 3.0), self.new, self.advantages) == [[1.0, 1.0]]

    def test_without_bounds_its_gradient_is_that_of_the_ratio(self):
        torch.manual_seed(0)
        new, advantages = torch.randn(3, 5), torch.randn(3, 5)
        close(gradient(CISPO(None, 1e6), new, advantages), gradient(Ratio(), new, advantages))


class TestValueLoss:
    def test_by_hand(self):
        values, old, returns = torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[3.0]])
        assert value_loss(values, old, returns, None).item() == 0.5
        # held within 0.5 of the old value: (0.5 - 3)^2 / 2, the larger of the two
        assert value_loss(values, old, returns, 0.5).item() == 3.125


class TestEvery:
    """Properties of every surrogate."""

    def test_the_list_is_complete(self):
        public = {c for c in vars(policylab.algorithms).values() if isinstance(c, type)}
        protocol = ("loss", "clipped", "on_policy")
        surrogates = {c for c in public if all(hasattr(c, name) for name in protocol)}
        assert {type(s) for s in ALL} == surrogates - {Surrogate}

    @every
    def test_at_ratio_one_the_gradient_is_that_of_reinforce(self, surrogate):
        """With one credit a sequence; the sequence's ratio shares it among the tokens, which sums up to the same."""
        torch.manual_seed(0)
        advantages = torch.randn(4, 1).expand(4, 6)
        new = torch.randn(4, 6, requires_grad=True)
        mask = torch.ones(4, 6, dtype=torch.bool)
        per_token = surrogate.loss(new, new.detach(), advantages, mask)
        (result,) = torch.autograd.grad(per_token.sum(), new)
        close(result, -advantages)
        assert surrogate.clipped(new, new.detach(), advantages, mask).sum() == 0

    @pytest.mark.parametrize("surrogate", [s for s in ALL if not isinstance(s, CISPO)], ids=repr)
    def test_clipped_is_where_the_gradient_is_gone(self, surrogate):
        """And only there. Tokens with zero advantage have no gradient to lose."""
        torch.manual_seed(0)
        advantages = torch.randn(50, 1).expand(50, 4).clone()
        advantages[::7] = 0.0
        new = torch.randn(50, 4)
        gone = (gradient(surrogate, new, advantages) == 0) & (advantages != 0)
        assert gone.double().tolist() == clipped(surrogate, new, advantages)

    @every
    @pytest.mark.parametrize("log_ratio", [-1e4, -200.0, 200.0, 1e4])
    @pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
    def test_extreme_ratios_are_finite(self, surrogate, log_ratio, advantage):
        """exp overflows in float32, and infinity times zero is NaN."""
        new, advantages = torch.full((1, 2), log_ratio), torch.full((1, 2), advantage)
        assert loss(surrogate, new, advantages).isfinite().all()
        assert gradient(surrogate, new, advantages).isfinite().all()

    @every
    def test_padding_changes_nothing(self, surrogate):
        torch.manual_seed(0)
        new, advantages = torch.randn(3, 4), torch.randn(3, 1).expand(3, 4)
        wide_new, wide_advantages = torch.zeros(3, 7), torch.zeros(3, 7)
        at = [0, 2, 3, 6]
        wide_new[:, at], wide_advantages[:, at] = new, advantages
        mask = torch.zeros(3, 7, dtype=torch.bool)
        mask[:, at] = True
        wide = loss(surrogate, wide_new, wide_advantages, mask)
        close(wide[:, at], loss(surrogate, new, advantages))
        assert (wide[~mask] == 0).all()
