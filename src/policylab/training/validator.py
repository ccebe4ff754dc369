"""Validation on held-out prompts: metrics and samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from policylab.data.rollout import Prompt, Sample
from policylab.errors import RunError
from policylab.rollouts.noise import VALIDATION
from policylab.tasks.base import Task, measured
from policylab.training.means import Means
from policylab.training.metrics import describe, means_of, measure
from policylab.training.sampler import Sampler, rewarded


class Validator:
    """Samples one completion a prompt, with noise that is the same at every validation.

    Args:
        prompts: all prompts of a validation, over all processes.

    Attributes:
        means: means of the current validation; a trainer may add to them.
        samples: samples of the current validation, on this process.
    """

    def __init__(self, sampler: Sampler, task: Task, prompts: Sequence[Prompt]) -> None:
        self.sampler = sampler
        self.task = task
        self.prompts = prompts
        self.means = Means()
        self.samples: list[Sample] = []

    def begin(self) -> None:
        """Begins a new validation."""
        self.sampler.begin_validation()
        self.means, self.samples = Means(), []

    @torch.no_grad()
    def add(self, prompts: Sequence[Prompt]) -> None:
        """Samples, scores and measures these prompts."""
        sampler = self.sampler
        rollout = sampler.generate(prompts, 1, VALIDATION, [prompt.id for prompt in prompts])
        completions, scores = sampler.score(rollout, prompts)
        rollout = rewarded(sampler.add_ref_logprobs(rollout), scores())
        measure(rollout, self.means, "val")
        for name, values in measured(self.task, completions).items():
            figures = torch.tensor(values, dtype=torch.double, device=sampler.runtime.device)
            self.means.add(f"val/{name}", figures)
        self.samples += describe(rollout, completions, "val", sampler.progress.iteration)

    def finish(self) -> dict[str, float]:
        """Metrics over all processes.

        Raises:
            RunError: when prompts are missing. Lightning ends a validation early when anything raises StopIteration.
        """
        counted = int(self.sampler.runtime.all_sum(torch.tensor(len(self.samples))))
        if counted != len(self.prompts):
            raise RunError(
                f"the validation of iteration {self.sampler.progress.iteration} ended after {counted} of "
                f"{len(self.prompts)} prompts and is not recorded; something raised StopIteration, which ends "
                "Lightning's loops: look at your callbacks"
            )
        return {**means_of(self.sampler.recorder.totals(self.means)), "val/prompts": float(counted)}
