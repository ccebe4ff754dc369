"""From a rollout with advantages to steps of the policy: the base of the minibatch and trust-region updaters."""

from __future__ import annotations

from typing import Generic, TypeVar, cast

import torch
from torch import Tensor

from policylab.algorithms import Algorithm
from policylab.algorithms.update import Update
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Rollout
from policylab.functional.ragged import on_device
from policylab.rollouts.noise import SHUFFLE, uniforms
from policylab.training.micro_batches import split
from policylab.training.sampler import Sampler
from policylab.training.stepper import Stepper

U = TypeVar("U", bound=Update)


class Updater(Generic[U]):
    """Base of the updaters.

    Attributes:
        settings: the update axis of the algorithm.
        ratio_max: the largest probability ratio of the last update on this process.
    """

    def __init__(self, algorithm: Algorithm, plan: BatchPlan, sampler: Sampler, stepper: Stepper) -> None:
        self.algorithm = algorithm
        self.settings = cast(U, algorithm.update)  # the method chooses the updater by them
        self.plan = plan
        self.sampler = sampler
        self.stepper = stepper
        self.policy = sampler.policy
        self.passes = sampler.passes
        self.runtime = sampler.runtime
        self.recorder = sampler.recorder
        self.progress = sampler.progress
        self.ratio_max = torch.ones(())

    def update(self, rollout: Rollout) -> None:
        """Trains on the rollouts of all processes; ``rollout`` is this process's."""
        raise NotImplementedError

    def minibatches(self, rollout: Rollout, epoch: int, size: int) -> list[Tensor]:
        """This process's rows of each minibatch of ``size`` sequences, without rows excluded from training.

        The order is drawn over the sequences of all processes, so that minibatches do not depend on the number of
        processes.
        """
        kept = rollout.loss_mask.any(-1).cpu()  # one copy to the host
        noise = uniforms(self.sampler.seed, SHUFFLE, self.progress.iteration, [epoch], self.plan.sequences)
        first = self.runtime.rank * len(rollout)
        shares = [rows - first for rows in split(noise[0], size)]
        mine = [rows[(rows >= 0) & (rows < len(rollout))] for rows in shares]
        return on_device([rows[kept[rows]] for rows in mine], rollout.tokens.device)
