"""Validation on held-out prompts: metrics and samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from policylab.data.rollout import Prompt, Sample
from policylab.errors import RunError, counted
from policylab.functional.pass_at_k import ks, pass_at_k
from policylab.rollouts.noise import VALIDATION
from policylab.tasks.base import Task, measured
from policylab.training.means import Means
from policylab.training.metrics import describe, means_of, measure
from policylab.training.sampler import Sampler, rewarded


class Validator:
    """Samples completions of each prompt, by default one, with the same noise at every validation.

    Args:
        prompts: all prompts of a validation, over all processes.

    Attributes:
        completions: number of completions of each prompt. The first one does not depend on the number.
        threshold: least reward of a completion that passes, for ``val/pass@k``; None does not measure it.
        means: means of the current validation; a trainer may add to them.
        samples: samples of the current validation, on this process.
    """

    def __init__(self, sampler: Sampler, task: Task, prompts: Sequence[Prompt]) -> None:
        self.sampler = sampler
        self.task = task
        self.prompts = prompts
        self.completions = 1
        self.threshold: float | None = None
        self.means = Means()
        self.samples: list[Sample] = []

    def begin(self) -> None:
        """Begins a new validation."""
        self.sampler.begin_validation()
        self.means, self.samples = Means(), []

    @torch.no_grad()
    def add(self, prompts: Sequence[Prompt]) -> None:
        """Samples, scores and measures these prompts."""
        sampler, n = self.sampler, self.completions
        stride = 1 + max(prompt.id for prompt in self.prompts)
        samples = [prompt.id + i * stride for prompt in prompts for i in range(n)]
        rollout = sampler.generate(prompts, n, VALIDATION, samples)
        completions, scores = sampler.score(rollout, [prompt for prompt in prompts for _ in range(n)])
        rollout = rewarded(sampler.add_ref_logprobs(rollout), scores())
        measure(rollout, self.means, "val")
        if self.threshold is not None:
            assert rollout.rewards is not None
            passed = (rollout.rewards >= self.threshold).view(-1, n).sum(-1)
            for k in ks(n):
                self.means.add(f"val/pass@{k}", pass_at_k(passed, n, k))
        for name, values in measured(self.task, completions).items():
            figures = torch.tensor(values, dtype=torch.double, device=sampler.runtime.device)
            self.means.add(f"val/{name}", figures)
        self.samples += describe(rollout, completions, "val", sampler.progress.iteration)

    def finish(self) -> dict[str, float]:
        """Metrics over all processes.

        Raises:
            RunError: when prompts are missing. Lightning ends a validation early when anything raises StopIteration.
        """
        done = int(self.sampler.runtime.all_sum(torch.tensor(len(self.samples)))) // self.completions
        if done != len(self.prompts):
            raise RunError(
                f"the validation of iteration {self.sampler.progress.iteration} ended after {done} of "
                f"{counted(len(self.prompts), 'prompt')} and is not recorded; something raised StopIteration, which "
                "ends Lightning's loops: look at your callbacks"
            )
        return {**means_of(self.sampler.recorder.totals(self.means)), "val/prompts": float(done)}
