"""Policy gradient: epochs of minibatches over each rollout."""

from __future__ import annotations

from typing import Literal

from omegaconf import DictConfig

from policylab.algorithms import Algorithm, MinibatchEpochs, MovingReference, OverlongPenalty
from policylab.data.plan import BatchPlan
from policylab.errors import UserError
from policylab.training import PolicyGradient
from policylab.training.methods.base import Method
from policylab.training.minibatches import MinibatchUpdater
from policylab.training.needs import Cost, CriticNeed, Needs
from policylab.training.parts import Parts


class PolicyGradientMethod(Method[Algorithm]):
    """Any choice along the axes of :class:`~policylab.algorithms.Algorithm`."""

    def plan(self, rollout: DictConfig, processes: int) -> BatchPlan:
        algorithm, group_size = self.algorithm, rollout.group_size
        if group_size < algorithm.min_group_size:
            part = "sampling=dynamic" if algorithm.advantage.min_group_size == 1 else "advantage"
            raise UserError(
                f"algo/{part} compares completions of the same prompt, but rollout.group_size is {group_size}; "
                f"take rollout.group_size={algorithm.min_group_size} or more"
            )
        update = algorithm.update
        return BatchPlan(rollout.prompts, group_size, update.epochs, update.minibatches, processes)

    def needs(self) -> Needs:
        algorithm = self.algorithm
        critic = algorithm.critic if algorithm.uses_critic else None
        return Needs(
            critic=None if critic is None else CriticNeed(critic.own_layers, critic.init),
            reference=self.reference,
        )

    @property
    def reference(self) -> Literal["none", "frozen", "moving"]:
        """The policy that the KL is measured to."""
        reference = self.algorithm.kl.reference
        if reference is None:
            return "none"
        return "moving" if isinstance(reference, MovingReference) else "frozen"

    def check(self, config: DictConfig) -> None:
        if self.reference == "moving" and config.model.get("adapter") is not None:
            raise UserError(
                "algo/reference=moving averages weights, and averaging adapters does not average the merged weights; "
                "with model/adapter=lora take algo/reference=frozen"
            )

    def check_episodes(self) -> None:
        if isinstance(self.algorithm.truncation, OverlongPenalty):
            raise UserError(
                "algo/truncation=penalty counts the tokens of one completion, but an episode has several turns; take "
                "algo/truncation=keep or mask"
            )

    def cost(self, plan: BatchPlan, *, exact: bool) -> Cost:
        """Passes of the reference, for log-probs that must be recomputed, and for both distributions of an exact KL."""
        kl, update = self.algorithm.kl, self.algorithm.update
        again = self.algorithm.recomputes_logprobs(exact=exact)
        estimates = update.epochs - 1 if isinstance(update, MinibatchEpochs) and update.reestimate else 0
        return Cost(
            forwards=(self.reference != "none") + again + 2 * kl.exact_in_reward + estimates,
            passes=update.epochs,
            compares=kl.exact_in_reward or kl.exact_in_loss,
        )

    def trainer(self, parts: Parts) -> PolicyGradient:
        return PolicyGradient(self.algorithm, parts, MinibatchUpdater)
