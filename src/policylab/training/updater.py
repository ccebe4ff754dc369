"""How a rollout with advantages becomes steps of the policy: what updates by minibatches and trust regions share."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from policylab.algorithms import Algorithm
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Rollout
from policylab.functional.ragged import on_device
from policylab.rollouts.noise import SHUFFLE, uniforms
from policylab.training.micro_batches import split
from policylab.training.sampler import Sampler
from policylab.training.stepper import Stepper


class Updater:
    """Base of the updaters.

    Attributes:
        whole_distributions: whether a pass holds the probabilities of all words at each action.
        ratio_max: the largest probability ratio of the last update on this process.
    """

    whole_distributions: ClassVar[bool] = False

    def __init__(self, algorithm: Algorithm, plan: BatchPlan, sampler: Sampler, stepper: Stepper) -> None:
        self.algorithm = algorithm
        self.plan = plan
        self.sampler = sampler
        self.stepper = stepper
        self.policy = sampler.policy
        self.passes = sampler.passes
        self.runtime = sampler.runtime
        self.recorder = sampler.recorder
        self.progress = sampler.progress
        self.ratio_max = torch.ones(())

    @property
    def first_pass_is_old(self) -> bool:
        """Whether every pass of an update is of the policy that sampled, so that it gives the old log-probs itself."""
        return False

    @property
    def forward_passes(self) -> float:
        """What an update costs, in forward passes over the rollout."""
        raise NotImplementedError

    def update(self, rollout: Rollout) -> None:
        """Trains on a rollout of this process and those of the others."""
        raise NotImplementedError

    def minibatches(self, rollout: Rollout, epoch: int, size: int) -> list[Tensor]:
        """This process's rows of each minibatch of ``size`` sequences, without those that are left out of training.

        The order is drawn over the sequences of all processes, so that a minibatch holds the same sequences however
        many processes share them.
        """
        kept = rollout.loss_mask.any(-1).cpu()  # one copy, and one back
        noise = uniforms(self.sampler.seed, SHUFFLE, self.progress.iteration, [epoch], self.plan.sequences)
        first = self.runtime.rank * len(rollout)
        shares = [rows - first for rows in split(noise[0], size)]
        mine = [rows[(rows >= 0) & (rows < len(rollout))] for rows in shares]
        return on_device([rows[kept[rows]] for rows in mine], rollout.tokens.device)
