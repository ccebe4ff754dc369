"""An algorithm is a choice along independent axes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.algorithms.advantage import Advantage
from policylab.algorithms.critic import Critic
from policylab.algorithms.kl import KLPenalty, shaped_token_rewards
from policylab.algorithms.reduction import Reduction
from policylab.algorithms.surrogate import Surrogate
from policylab.algorithms.update import MinibatchEpochs
from policylab.errors import UserError
from policylab.functional.masks import AllSum
from policylab.functional.surrogates import value_loss
from policylab.rollouts.types import Evaluation, Rollout


@dataclass(frozen=True)
class LossTerms:
    """Per-token parts of the loss, each before its coefficient. None where the algorithm has no such part."""

    surrogate: Float[Tensor, "B T"]
    entropy: Float[Tensor, "B T"]
    value: Float[Tensor, "B T"] | None
    kl: Float[Tensor, "B T"] | None
    clipped: Float[Tensor, "B T"]


@dataclass(frozen=True)
class Algorithm:
    """A policy-gradient method: one part for each axis, and nothing that knows of a training loop.

    Args:
        name: names the run.
        advantage: what each action is credited with.
        surrogate: the loss whose gradient moves the policy.
        reduction: how much each token weighs.
        kl: where the distance to the reference counts.
        update: how a rollout becomes optimizer steps.
        critic: the value head; built only when the advantage needs values.
        entropy_coef: weight of the entropy bonus (reward a nat).
    """

    name: str
    advantage: Advantage
    surrogate: Surrogate
    reduction: Reduction
    kl: KLPenalty
    update: MinibatchEpochs
    critic: Critic | None
    entropy_coef: float

    def __post_init__(self) -> None:
        if self.advantage.needs_values and self.critic is None:
            raise UserError(
                f"algo.advantage={type(self.advantage).__name__} needs a critic, but algo.critic is none; "
                "take algo/critic=shared_trunk or another algo/advantage"
            )
        steps = self.update.epochs * self.update.minibatches
        if self.surrogate.on_policy and steps > 1:
            raise UserError(
                f"algo.surrogate={type(self.surrogate).__name__} is right for one update a rollout only, and here are {steps}; take "
                "algo/update=single_step or algo/surrogate=clipped_ratio"
            )

    @property
    def uses_critic(self) -> bool:
        """Whether a value head is built and trained."""
        return self.advantage.needs_values

    def shape_rewards(self, rollout: Rollout, kl_coef: float) -> Rollout:
        """The rollout with token rewards: the sequence's reward at its end, KL penalty on the way."""
        return rollout.replace(token_rewards=shaped_token_rewards(rollout, self.kl, kl_coef))

    def estimate_advantages(self, rollout: Rollout, all_sum: AllSum) -> Rollout:
        """The rollout with advantages and value targets."""
        estimate = self.advantage(rollout, all_sum)
        return rollout.replace(advantages=estimate.advantages, returns=estimate.returns)

    def loss_terms(self, rollout: Rollout, evaluation: Evaluation) -> LossTerms:
        """The parts of the loss, for the current policy's evaluation of the rollout."""
        assert rollout.advantages is not None
        new, old = evaluation.logprobs, rollout.old_logprobs
        value = None
        if self.uses_critic:
            assert self.critic is not None
            assert evaluation.values is not None
            assert rollout.values is not None
            assert rollout.returns is not None
            value = value_loss(evaluation.values, rollout.values, rollout.returns, self.critic.clip)
        with torch.no_grad():
            clipped = self.surrogate.clipped(new, old, rollout.advantages, rollout.loss_mask)
        return LossTerms(
            surrogate=self.surrogate.loss(new, old, rollout.advantages, rollout.loss_mask),
            entropy=evaluation.entropy,
            value=value,
            kl=self.kl.of_evaluation(evaluation, rollout) if self.kl.place == "loss" else None,
            clipped=clipped,
        )

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
