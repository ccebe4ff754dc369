"""Returns and advantages: hand-computed numbers, identities, and changes that must not change the result."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

import policylab.algorithms
from policylab.algorithms import (
    GAE,
    Advantage,
    BestOfGroup,
    GreedyBaseline,
    GroupBaseline,
    LeaveOneOut,
    NStep,
    ReturnToGo,
    SequenceMean,
    SequenceSum,
    VTrace,
)
from policylab.data.rollout import Rollout
from policylab.errors import UserError
from policylab.functional.advantages import (
    discounted_returns,
    explained_variance,
    gae,
    n_step,
    subtract_batch_mean,
)
from policylab.functional.groups import best_of_group, group_centered, group_normalized, leave_one_out
from policylab.functional.vtrace import vtrace

ALL = (
    ReturnToGo(0.9, "none", False),
    ReturnToGo(1.0, "mean", False),
    ReturnToGo(1.0, "none", True),
    GreedyBaseline(),
    LeaveOneOut(),
    GroupBaseline(normalize=True),
    GroupBaseline(normalize=False),
    BestOfGroup(),
    GAE(0.9, 0.8, False),
    GAE(1.0, 0.95, True),
    NStep(0.9, 1, False),
    NStep(0.9, 2, True),
    NStep(0.9, 50, False),
    VTrace(0.9, 1.0, 0.9, False),
    VTrace(0.9, math.inf, math.inf, True),
)
GROUP = tuple(a for a in ALL if a.min_group_size > 1)

every = pytest.mark.parametrize("advantage", ALL, ids=repr)
close = torch.testing.assert_close


def same(x: Tensor) -> Tensor:
    """The sum over processes, with one process."""
    return x


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers])


def true(width: int) -> Tensor:
    return torch.ones(1, width, dtype=torch.bool)


def rollout_of(mask: Tensor, token_rewards: Tensor, group_ids: Tensor, **columns: Tensor) -> Rollout:
    """A rollout with the fields that advantages read; the others are empty."""
    n, width = mask.shape
    positions = torch.arange(1, width + 1)
    return Rollout(
        prompt_tokens=torch.zeros(n, 1, dtype=torch.long),
        prompt_lengths=torch.ones(n, dtype=torch.long),
        tokens=torch.zeros(n, width, dtype=torch.long),
        lengths=(mask * positions).amax(-1),
        action_mask=mask,
        ended=torch.ones(n, dtype=torch.bool),
        group_ids=group_ids,
        prompt_ids=group_ids,
        token_rewards=token_rewards,
        **{"logprobs": torch.zeros_like(token_rewards), **columns},
    )


@pytest.fixture
def rollout() -> Rollout:
    """Seven random sequences of three groups, in mixed order, with tokens of an environment in between. In float64."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.double)

    rows = ("11111", "11011", "10000", "01110", "11100", "10101", "11110")
    mask = torch.tensor([[c == "1" for c in r] for r in rows])
    columns = {name: draw(7, 5) * mask for name in ("logprobs", "policy_logprobs", "values")}
    group_ids = torch.tensor([4, 9, 4, 2, 9, 4, 2])
    return rollout_of(mask, draw(7, 5) * mask, group_ids, greedy_rewards=draw(7), **columns)


def rows_of(rollout: Rollout, rows: Tensor) -> Rollout:
    """The given rows in the given order, at full width."""
    columns = {f.name: getattr(rollout, f.name) for f in fields(rollout)}
    return replace(rollout, **{name: x[rows] for name, x in columns.items() if isinstance(x, Tensor)})


def agree(rollout: Rollout, one: Advantage, other: Advantage) -> None:
    """Asserts that both have the same credits and targets."""
    for name in ("advantages", "returns"):
        close(getattr(one(rollout, same), name), getattr(other(rollout, same), name))


class TestReturns:
    MASK = torch.tensor([[True, True, True], [True, True, False]])

    def test_discounted_by_hand(self):
        # 4; 2 + 4/2 = 4; 1 + 4/2 = 3
        assert discounted_returns(row(1.0, 2.0, 4.0), true(3), 0.5).tolist() == [[3.0, 4.0, 4.0]]

    def test_positions_of_an_environment_are_skipped(self):
        mask = torch.tensor([[True, False, True]])
        # the middle is an environment's word: one discount between the two actions, not two
        assert discounted_returns(row(1.0, 9.0, 4.0), mask, 0.5).tolist() == [[3.0, 0.0, 4.0]]

    def test_batch_mean_by_hand(self):
        returns = torch.tensor([[3.0, 2.0, 1.0], [5.0, 4.0, 0.0]])
        # whole returns 3 and 5, mean 4
        expected = [[-1.0, -2.0, -3.0], [1.0, 0.0, 0.0]]
        assert subtract_batch_mean(returns, self.MASK, same).tolist() == expected

    def test_greedy_baseline_by_hand(self):
        rewards = torch.tensor([[0.0, -1.0, 3.0], [0.0, 5.0, 0.0]])
        rollout = rollout_of(
            self.MASK, rewards, torch.tensor([0, 1]), greedy_rewards=torch.tensor([1.0, 4.0])
        )
        # returns to go 2, 2, 3 less 1; 5, 5 less 4
        assert GreedyBaseline()(rollout, same).advantages.tolist() == [[1.0, 1.0, 2.0], [1.0, 1.0, 0.0]]


class TestGAE:
    rewards, values, mask = row(0.0, 0.0, 1.0), row(0.5, 0.25, 0.75), true(3)

    def test_by_hand(self):
        # gamma 0.9, lam 0.8; deltas: 0.9*0.25-0.5 = -0.275; 0.9*0.75-0.25 = 0.425; 1-0.75 = 0.25
        # A2 = 0.25; A1 = 0.425 + 0.72*0.25 = 0.605; A0 = -0.275 + 0.72*0.605 = 0.1606
        close(gae(self.rewards, self.values, self.mask, 0.9, 0.8), row(0.1606, 0.605, 0.25))

    def test_one_one_is_return_minus_value(self):
        expected = discounted_returns(self.rewards, self.mask, 1.0) - self.values
        close(gae(self.rewards, self.values, self.mask, 1.0, 1.0), expected)

    def test_zero_is_the_td_residual(self):
        close(gae(self.rewards, self.values, self.mask, 1.0, 0.0), row(-0.25, 0.5, 0.25))


class TestNStep:
    def test_by_hand(self):
        rewards, values = row(1.0, 2.0, 4.0, 8.0), row(0.5, 1.0, 2.0, 3.0)
        # gamma 1/2, n 2: 1 + 2/2 + 2/4 - 0.5 = 2; 2 + 4/2 + 3/4 - 1 = 3.75; 4 + 8/2 - 2 = 6; 8 - 3 = 5
        close(n_step(rewards, values, true(4), 0.5, 2), row(2.0, 3.75, 6.0, 5.0))

    def test_tokens_of_an_environment_are_no_steps(self):
        rewards, values = row(1.0, 9.0, 2.0, 4.0, 9.0, 8.0), row(0.5, 9.0, 1.0, 2.0, 9.0, 3.0)
        mask = torch.tensor([[True, False, True, True, False, True]])
        close(n_step(rewards, values, mask, 0.5, 2), row(2.0, 0.0, 3.75, 6.0, 0.0, 5.0))

    def test_one_step_is_gae_with_lambda_zero(self, rollout):
        agree(rollout, NStep(0.9, 1, False), GAE(0.9, 0.0, False))

    @pytest.mark.parametrize("n", [5, 6, 1000])
    def test_as_many_steps_as_there_are_is_gae_with_lambda_one(self, rollout, n):
        agree(rollout, NStep(0.9, n, False), GAE(0.9, 1.0, False))

    def test_no_step_is_refused(self):
        with pytest.raises(UserError, match=r"algo\.advantage\.n is 0; it must be at least 1"):
            NStep(1.0, 0, False)


class TestVTrace:
    rewards, values = row(0.0, 1.0), row(0.5, 0.25)
    ratio = row(2.0, 0.5).log()

    def test_by_hand(self):
        # gamma 1, rho <= 1.5, c <= 1, ratios 2 and 1/2:
        # t 1: rho 0.5; A = 0.5 (1 - 0.25) = 0.375; v = 0.25 + 0.375 = 0.625
        # t 0: rho 1.5, c 1; A = 1.5 (0.625 - 0.5) = 0.1875
        #      v = 0.5 + 1.5 (0.25 - 0.5) + 1 (0.625 - 0.25) = 0.5 - 0.375 + 0.375 = 0.5
        advantages, targets = vtrace(self.rewards, self.values, self.ratio, true(2), 1.0, 1.5, 1.0)
        close(advantages, row(0.1875, 0.375))
        close(targets, row(0.5, 0.625))

    def test_the_bounds_are_independent(self):
        # c <= 0.4 in place of 1: v_0 = 0.5 - 0.375 + 0.4 * 0.375 = 0.275
        _, targets = vtrace(self.rewards, self.values, self.ratio, true(2), 1.0, 1.5, 0.4)
        close(targets, row(0.275, 0.625))

    @pytest.mark.parametrize("bound", [1.0, 2.0, math.inf])
    def test_on_policy_it_is_return_minus_value(self, rollout, bound):
        rollout = rollout.replace(policy_logprobs=rollout.logprobs)
        agree(rollout, VTrace(0.9, bound, bound, False), NStep(0.9, 1000, False))

    def test_no_weight_at_all_is_refused(self):
        with pytest.raises(UserError, match=r"algo\.advantage\.rho_clip is 0"):
            VTrace(1.0, 0.0, 1.0, False)

    def test_extreme_ratios_are_finite(self):
        advantages, targets = vtrace(self.rewards, self.values, row(1e4, -1e4), true(2), 1.0, math.inf, 1.0)
        assert advantages.isfinite().all()
        assert targets.isfinite().all()


class TestGroups:
    #          group 0 | 1 | 0 | 2 | 0 | 1
    x = torch.tensor([1.0, 5.0, 2.0, 7.0, 6.0, 5.0])
    group_ids = torch.tensor([0, 1, 0, 2, 0, 1])
    present = torch.ones(6, dtype=torch.bool)

    def test_leave_one_out_by_hand(self):
        # group 0: 1 - (2+6)/2 = -3; 2 - (1+6)/2 = -1.5; 6 - (1+2)/2 = 4.5; group 1: equal; group 2: alone
        result = leave_one_out(self.x, self.group_ids, self.present)
        assert result.tolist() == [-3.0, 0.0, -1.5, 0.0, 4.5, 0.0]

    def test_centered_by_hand(self):
        # group 0: mean 3
        result = group_centered(self.x, self.group_ids, self.present)
        assert result.tolist() == [-2.0, 0.0, -1.0, 0.0, 3.0, 0.0]

    def test_normalized_by_hand(self):
        # group 0: sample variance (4 + 1 + 9) / 2 = 7
        result = group_normalized(self.x, self.group_ids, self.present)
        close(result, torch.tensor([-2.0, 0.0, -1.0, 0.0, 3.0, 0.0]) / (math.sqrt(7) + 1e-6))

    def test_best_by_hand(self):
        # 6 is the best of three; group 1 has no best, group 2 no other
        result = best_of_group(self.x, self.group_ids, self.present)
        assert result.tolist() == [0.0, 0.0, 0.0, 0.0, 3.0, 0.0]

    def test_of_two_best_the_first_is_taken(self):
        x, ids = torch.tensor([1.0, 4.0, 4.0]), torch.zeros(3, dtype=torch.long)
        assert best_of_group(x, ids, torch.ones(3, dtype=torch.bool)).tolist() == [0.0, 3.0, 0.0]

    def test_rounding_selects_nothing(self):
        """Equal rewards minus a KL of almost zero: no best, or the first."""
        x = torch.tensor([1.0, 1.0, 0.5, 1.0, 1.0]) + torch.tensor([0.0, 3e-6, 0.0, 1e-6, 2e-6])
        ids = torch.tensor([0, 0, 1, 1, 1])
        assert best_of_group(x, ids, torch.ones(5, dtype=torch.bool)).tolist() == [0.0, 0.0, 0.0, 3.0, 0.0]

    def test_an_excluded_row_is_not_compared_with(self):
        present = torch.tensor([True, True, True, True, False, True])
        # group 0 without the 6: 1 - 2 and 2 - 1
        result = leave_one_out(self.x, self.group_ids, present)
        assert result.tolist() == [-1.0, 0.0, 1.0, 0.0, 0.0, 0.0]

    def test_the_whole_reward_is_summed_undiscounted_and_given_to_all_actions(self):
        mask = torch.tensor([[True, False, True], [True, True, True]])
        rewards = torch.tensor([[1.0, 9.0, 2.0], [0.0, 0.0, 5.0]])
        estimate = LeaveOneOut()(rollout_of(mask, rewards, torch.tensor([3, 3])), same)
        # 1 + 2 = 3 against 5
        assert estimate.advantages.tolist() == [[-2.0, 0.0, -2.0], [2.0, 2.0, 2.0]]
        assert estimate.returns.tolist() == [[3.0, 0.0, 2.0], [5.0, 5.0, 5.0]]

    @pytest.mark.parametrize("size", [2, 3, 8])
    def test_leave_one_out_is_the_mean_baseline_but_for_a_factor(self, size):
        x = torch.randn(size, generator=torch.Generator().manual_seed(size))
        group = torch.zeros(size, dtype=torch.long), torch.ones(size, dtype=torch.bool)
        close(leave_one_out(x, *group), size / (size - 1) * group_centered(x, *group))

    def test_at_constant_length_grpo_without_std_is_dr_grpo_but_for_a_constant(self, rollout):
        """The mean over a sequence's tokens differs from their sum over a constant by ``constant / length``."""
        length, constant = 5, 20.0
        mask = torch.ones(7, length, dtype=torch.bool)
        rollout = rollout_of(mask, rollout.token_rewards, rollout.group_ids)
        loss = -GroupBaseline(normalize=False)(rollout, same).advantages
        grpo, dr_grpo = SequenceMean(), SequenceSum(constant)
        close(
            grpo(loss, mask, grpo.denominator(mask)) * length / constant,
            dr_grpo(loss, mask, dr_grpo.denominator(mask)),
        )


class TestExplainedVariance:
    def test_by_hand(self):
        # residuals 0, 0, 1: variance 2/9; returns: variance 2/3; 1 - 1/3
        result = explained_variance(row(1.0, 2.0, 2.0), row(1.0, 2.0, 3.0), true(3), same)
        assert result.item() == pytest.approx(2 / 3)

    def test_returns_without_spread(self):
        x = torch.ones(1, 3)
        assert explained_variance(x, x, x.bool(), same).item() == 0


class TestInvariances:
    """Properties of every advantage."""

    def test_the_list_is_complete(self):
        public = {c for c in vars(policylab.algorithms).values() if isinstance(c, type)}
        assert {type(a) for a in ALL} == {c for c in public if issubclass(c, Advantage)} - {Advantage}

    @every
    def test_it_is_zero_outside_the_mask(self, rollout, advantage):
        estimate = advantage(rollout, same)
        assert (estimate.advantages[~rollout.loss_mask] == 0).all()
        assert (estimate.returns[~rollout.loss_mask] == 0).all()

    @every
    def test_more_padding_and_more_words_between_change_nothing(self, rollout, advantage):
        """Whatever the values there, also NaN."""
        at = torch.tensor([0, 2, 3, 6, 7])
        wide = {}
        for field in fields(rollout):
            x = getattr(rollout, field.name)
            if isinstance(x, Tensor) and x.ndim == 2 and x.shape[1] == 5:
                filler = torch.nan if x.is_floating_point() else 0
                wide[field.name] = torch.full((7, 9), filler, dtype=x.dtype).index_copy(1, at, x)
        estimate, plain = advantage(replace(rollout, **wide), same), advantage(rollout, same)
        close(estimate.advantages[:, at], plain.advantages)
        close(estimate.returns[:, at], plain.returns)
        assert estimate.advantages.sum() == pytest.approx(float(plain.advantages.sum()))  # nothing elsewhere

    @every
    def test_the_order_of_the_rows_changes_nothing(self, rollout, advantage):
        order = torch.tensor([6, 2, 0, 4, 3, 5, 1])
        close(advantage(rows_of(rollout, order), same).advantages, advantage(rollout, same).advantages[order])

    @every
    def test_an_excluded_row_has_no_influence(self, rollout, advantage):
        kept = torch.tensor([True, True, False, True, True, True, False])
        estimate = advantage(rollout.replace(kept=kept), same)
        alone = advantage(rows_of(rollout, kept.nonzero().squeeze(-1)), same)
        close(estimate.advantages[kept], alone.advantages)
        close(estimate.returns[kept], alone.returns)
        assert (estimate.advantages[~kept] == 0).all()

    @every
    def test_a_row_without_actions_has_no_influence(self, rollout, advantage):
        mask = rollout.action_mask.clone()
        mask[2] = False
        others = torch.tensor([0, 1, 3, 4, 5, 6])
        estimate = advantage(rollout.replace(action_mask=mask), same)
        close(estimate.advantages[others], advantage(rows_of(rollout, others), same).advantages)

    @every
    def test_without_included_rows_all_advantages_are_zero(self, rollout, advantage):
        estimate = advantage(rollout.replace(kept=torch.zeros(7, dtype=torch.bool)), same)
        assert (estimate.advantages == 0).all()
        assert (estimate.returns == 0).all()

    @every
    @pytest.mark.parametrize("reward", [0.0, 0.1, -1e30, 1e-30])
    def test_equal_rewards_give_no_nan(self, rollout, advantage, reward):
        equal = torch.where(rollout.action_mask, reward, 0.0).float()
        columns = {"token_rewards": equal, "values": equal, "greedy_rewards": torch.full((7,), reward)}
        assert advantage(rollout.replace(**columns), same).advantages.isfinite().all()

    @pytest.mark.parametrize("advantage", GROUP, ids=repr)
    @pytest.mark.parametrize("reward", [0.0, 0.1, 0.7, -1e30])
    @pytest.mark.parametrize("size", [2, 3, 7, 11])
    def test_a_group_of_equal_rewards_gets_zero(self, advantage, reward, size):
        """Exactly zero: a rounding error divided by a standard deviation of almost zero would be large noise."""
        rewards = torch.full((size, 1), reward)
        group = torch.zeros(size, dtype=torch.long)
        estimate = advantage(rollout_of(torch.ones(size, 1, dtype=torch.bool), rewards, group), same)
        assert (estimate.advantages == 0).all()

    @pytest.mark.parametrize("advantage", GROUP, ids=repr)
    def test_groups_are_independent(self, rollout, advantage):
        one = (rollout.group_ids == 4).nonzero().squeeze(-1)
        close(advantage(rollout, same).advantages[one], advantage(rows_of(rollout, one), same).advantages)

    @pytest.mark.parametrize("advantage", [a for a in ALL if a.per_sequence], ids=repr)
    def test_a_sequence_has_one_credit(self, rollout, advantage):
        credits = advantage(rollout, same).advantages
        for credit, mask in zip(credits, rollout.loss_mask, strict=True):
            assert credit[mask].unique().numel() == 1
