"""Supervised training: updates on the completions of the data."""

from __future__ import annotations

from omegaconf import DictConfig

from policylab.algorithms import Supervised
from policylab.data.plan import BatchPlan
from policylab.errors import UserError
from policylab.training import SupervisedTraining
from policylab.training.methods.base import Method
from policylab.training.needs import Needs
from policylab.training.parts import Parts


class SupervisedMethod(Method[Supervised]):
    """One update on each batch of examples."""

    def plan(self, rollout: DictConfig, processes: int) -> BatchPlan:
        return BatchPlan(self.algorithm.batch_size, 1, 1, 1, processes)

    def needs(self) -> Needs:
        return Needs(learns_from="completions")

    def check(self, config: DictConfig) -> None:
        if config.max_tokens is not None:
            raise UserError(
                f"max_tokens={config.max_tokens} counts tokens sampled in training, and algo={self.algorithm.name} "
                "samples none; take max_tokens=null, and set the length by iterations"
            )

    def trainer(self, parts: Parts) -> SupervisedTraining:
        return SupervisedTraining(self.algorithm, parts)
