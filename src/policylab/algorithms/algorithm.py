"""A policy-gradient algorithm: a choice on each of several independent axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.algorithms.advantage import Advantage, Estimate
from policylab.algorithms.combinations import check_combination
from policylab.algorithms.critic import Critic
from policylab.algorithms.importance import TruncatedImportance
from policylab.algorithms.kl import KLPenalty, NoPenalty
from policylab.algorithms.reduction import Reduction
from policylab.algorithms.sampling import DynamicSampling
from policylab.algorithms.surrogate import Surrogate
from policylab.algorithms.truncation import Truncation
from policylab.algorithms.update import Update
from policylab.contracts import check_grid, returned
from policylab.data.rollout import Evaluation, Rollout
from policylab.errors import check_range
from policylab.functional.masks import AllSum, last_position
from policylab.functional.surrogates import value_loss


@dataclass(frozen=True)
class LossTerms:
    """Per-token parts of the loss, each before its coefficient. None if the algorithm has no such part."""

    surrogate: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    value: Float[Tensor, "B T"] | None
    kl: Float[Tensor, "B T"] | None
    clipped: Float[Tensor, "B T"]


@dataclass(frozen=True)
class Algorithm:
    """A policy-gradient method: one part for each axis, independent of the training loop.

    Args:
        name: names the run.
        advantage: the credit of each action.
        surrogate: the loss whose gradient moves the policy.
        reduction: the weight of each token.
        kl: where the KL to the reference is penalized.
        update: the optimizer steps on a rollout.
        critic: how it is built and trained; used only when the advantage needs values.
        sampling: which groups are trained on; None: all.
        truncation: how completions cut at the length limit are treated; None: like all others.
        importance: correction for a sampler that differs from the policy; None: no correction.
        entropy_coef: weight of the entropy bonus (loss a nat).

    Raises:
        UserError: for an invalid combination.
    """

    name: str
    advantage: Advantage
    surrogate: Surrogate
    reduction: Reduction
    kl: KLPenalty | NoPenalty
    update: Update
    critic: Critic | None
    sampling: DynamicSampling | None
    truncation: Truncation | None
    importance: TruncatedImportance | None
    entropy_coef: float

    def __post_init__(self) -> None:
        check_range("algo.entropy_coef", self.entropy_coef, 0)
        check_combination(self.advantage, self.surrogate, self.update, self.kl, self.critic, self.importance)

    @property
    def uses_critic(self) -> bool:
        """Whether a critic is built and trained."""
        return self.advantage.needs_values

    def recomputes_logprobs(self, *, exact: bool) -> bool:
        """Whether the log-probs of the sampled tokens are recomputed before the update.

        Args:
            exact: whether the log-probs recorded while sampling are those of the policy. They are not with another
                engine or in lower precision.
        """
        if self.importance is not None or self.advantage.needs_policy_logprobs:
            return True
        return not (exact or (self.update.gives_old_logprobs and self.kl.place != "reward"))

    @property
    def min_group_size(self) -> int:
        """Completions that each prompt needs."""
        return max(self.advantage.min_group_size, 1 if self.sampling is None else 2)

    def select(self, rollout: Rollout) -> Rollout:
        """The rollout with the sequences that are left out of the update marked."""
        kept = torch.ones_like(rollout.ended)
        if self.sampling is not None:
            kept &= self.sampling.spread(rollout)
        if self.truncation is not None:
            kept &= self.truncation.keeps(rollout)
        return rollout.replace(kept=kept)

    def shape_rewards(self, rollout: Rollout, kl_coef: float) -> Rollout:
        """The rollout with token rewards: the sequence's reward at its last action, minus the KL penalty of each
        action if it is part of the reward. The part that belongs to a turn is at the last action of that turn.

        ``R_t = [t = last] r - beta KL_t``; arXiv:1909.08593, eq. 2.
        """
        assert rollout.rewards is not None
        rewards = rollout.rewards
        if self.truncation is not None:
            rewards = rewards + self.truncation.penalty(rollout)
        turns = rollout.turn_rewards
        rest = rewards if turns is None else rewards - turns.sum(-1)
        token_rewards = torch.where(last_position(rollout.action_mask), rest[:, None], 0.0)
        if turns is not None:
            token_rewards = token_rewards + turns
        if isinstance(self.kl, KLPenalty) and self.kl.place == "reward":
            token_rewards = token_rewards - kl_coef * self.kl.of_rollout(rollout)
        return rollout.replace(token_rewards=token_rewards)

    def estimate_advantages(self, rollout: Rollout, all_sum: AllSum) -> Rollout:
        """The rollout with advantages and value targets."""
        owner = type(self.advantage).__name__
        estimate = returned(owner, self.advantage(rollout, all_sum), Estimate)
        check_grid(f"the advantages of {owner}", estimate.advantages, rollout.action_mask)
        check_grid(f"the returns of {owner}", estimate.returns, rollout.action_mask)
        return rollout.replace(advantages=estimate.advantages, returns=estimate.returns)

    def correct_sampler(self, rollout: Rollout) -> Rollout:
        """The rollout with importance weights that correct for its sampler."""
        if self.importance is None:
            return rollout
        return rollout.replace(importance=self.importance.weights(rollout))

    def loss_terms(self, rollout: Rollout, evaluation: Evaluation) -> LossTerms:
        """The parts of the loss, for the current policy's evaluation of the rollout."""
        assert rollout.advantages is not None
        sample = (evaluation.logprobs, rollout.old_logprobs, rollout.advantages, rollout.loss_mask)
        surrogate = self.surrogate.loss(*sample)
        check_grid(f"what {type(self.surrogate).__name__}.loss returned", surrogate, rollout.action_mask)
        if rollout.importance is not None:
            surrogate = surrogate * rollout.importance
        with torch.no_grad():
            clipped = self.surrogate.clipped(*sample)
            check_grid(f"what {type(self.surrogate).__name__}.clipped returned", clipped, rollout.action_mask)
        kl = None
        if isinstance(self.kl, KLPenalty) and self.kl.place == "loss":
            kl = self.kl.of_evaluation(evaluation, rollout)
        return LossTerms(
            surrogate=surrogate,
            entropy=evaluation.entropy,
            value=self.value_loss(rollout, evaluation.values) if self.uses_critic else None,
            kl=kl,
            clipped=clipped,
        )

    def value_loss(self, rollout: Rollout, values: Float[Tensor, "B T"] | None) -> Float[Tensor, "B T"]:
        """The critic's loss a token, before its coefficient."""
        assert self.critic is not None
        assert values is not None
        assert rollout.values is not None
        assert rollout.returns is not None
        return value_loss(values, rollout.values, rollout.returns, self.critic.clip)

    def loss(self, terms: LossTerms, kl_coef: float) -> Float[Tensor, "B T"]:
        """``surrogate + c_v value + beta KL - c_e entropy``, a token."""
        loss = terms.surrogate
        if terms.value is not None:
            assert self.critic is not None
            loss = loss + self.critic.coef * terms.value
        if terms.kl is not None:
            loss = loss + kl_coef * terms.kl
        if self.entropy_coef:
            loss = loss - self.entropy_coef * terms.entropy
        return loss
