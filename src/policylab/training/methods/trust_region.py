"""Trust region: one step of the policy on each rollout, then updates of the critic."""

from __future__ import annotations

from dataclasses import replace

from omegaconf import DictConfig

from policylab.algorithms import Algorithm, TrustRegion
from policylab.data.plan import BatchPlan
from policylab.errors import UserError
from policylab.training import PolicyGradient, TrustRegionUpdater
from policylab.training.methods.policy_gradient import PolicyGradientMethod
from policylab.training.needs import Cost, Needs
from policylab.training.parts import Parts

#: Vectors as long as the trainable weights that conjugate gradients and the line search hold.
VECTORS = 8


class TrustRegionMethod(PolicyGradientMethod):
    """An :class:`~policylab.algorithms.Algorithm` whose update is a :class:`~policylab.algorithms.TrustRegion`."""

    def __init__(self, algorithm: Algorithm) -> None:
        super().__init__(algorithm)
        assert isinstance(algorithm.update, TrustRegion)
        self.region = algorithm.update

    def plan(self, rollout: DictConfig, processes: int) -> BatchPlan:
        plan = super().plan(rollout, processes)
        if self.algorithm.uses_critic:
            self.region.check_shares(plan.sequences)
        return plan

    def needs(self) -> Needs:
        return replace(super().needs(), whole_distributions=True)

    def check(self, config: DictConfig) -> None:
        super().check(config)
        if config.hardware.strategy == "fsdp":
            raise UserError(
                "hardware.strategy=fsdp: a trust region works on all weights as one vector, which no process holds; "
                "take hardware=ddp, or algo/update=minibatch_epochs"
            )

    def cost(self, plan: BatchPlan, *, exact: bool) -> Cost:
        """In forward passes: gradient 3, product with the Fisher matrix 5, step length 3, line search 4, epoch of the
        critic 1."""
        region = self.region
        products = region.fisher_share * 5 * (region.cg_iterations + 1)
        critic = region.critic_epochs if self.algorithm.uses_critic else 0
        return replace(
            super().cost(plan, exact=exact),
            passes=(3 + products + 3 + 4 + critic) / 3,
            vectors=VECTORS,
            optimizes_policy=False,
        )

    def trainer(self, parts: Parts) -> PolicyGradient:
        return PolicyGradient(self.algorithm, parts, TrustRegionUpdater)
