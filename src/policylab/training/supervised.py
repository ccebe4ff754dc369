"""Supervised training on the task's completions, on the same grid, engine and loop as the rest."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from policylab.algorithms import Supervised
from policylab.data.rollout import Prompt, PromptBatch, Rollout
from policylab.functional.masks import length_mask
from policylab.functional.reduction import token_sum
from policylab.rollouts.engine import pad_left
from policylab.training.experiment import ExperimentModule, Parts
from policylab.training.means import TRAINED
from policylab.training.preflight import Pace


class SupervisedTraining(ExperimentModule):
    """Maximum likelihood, with the same validation as the policy-gradient methods beside its own loss."""

    def __init__(self, algorithm: Supervised, parts: Parts) -> None:
        super().__init__(parts)
        self.algorithm = algorithm

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: one optimizer step on one batch of examples."""
        started = time.perf_counter()
        lr = self.set_learning_rate()
        with self.phase("update"):
            grid = demonstrations(batch.prompts, self.algorithm.loss_on, self.device)
            rows = torch.arange(len(grid), device=self.device)
            tokens = self.all_sum(grid.action_mask.sum())

            def loss_of(piece: Rollout) -> Tensor:
                negative = -self.policy.logprobs_of(piece, temperature=1.0)
                self._means.add("train/loss", negative, piece.action_mask)
                return token_sum(negative, piece.action_mask, tokens.float())

            self.accumulate(grid, rows, loss_of)
            if self.apply_gradients(grid, rows):
                self._means.add(TRAINED, grid.action_mask.sum())
        self.finish_iteration({"train/lr": lr, "tokens": tokens}, started)

    def seconds_per_iteration(self, pace: Pace) -> float:
        """A forward and a backward pass."""
        return self.plan.sequences / self.plan.processes * 3 * pace.forward

    @torch.no_grad()
    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Loss on the held-out completions, where there are any, and what the policy writes itself."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        if all(prompt.target for prompt in data.val):  # of all processes, which go through the same passes
            grid = demonstrations(batch.prompts, self.algorithm.loss_on, self.device)
            negative = -self.per_token(grid, lambda piece: self.policy.logprobs_of(piece, temperature=1.0))
            self._val_means.add("val/loss", negative, grid.action_mask)
        super().validation_step(batch, batch_idx)


def demonstrations(prompts: Sequence[Prompt], loss_on: str, device: torch.device) -> Rollout:
    """The completions of a data set on the grid of a rollout, as if the policy had chosen them.

    With ``loss_on="full"`` only the first token of the prompt stays a prompt.
    """
    cut = [1 if loss_on == "full" else len(p.tokens) for p in prompts]
    targets = [(p.tokens[c:] + p.target) for p, c in zip(prompts, cut, strict=True)]
    prompt_tokens, prompt_lengths = pad_left(
        [p.tokens[:c] for p, c in zip(prompts, cut, strict=True)], device
    )
    lengths = torch.tensor([len(t) for t in targets], device=device)
    width = int(lengths.max())
    tokens = torch.tensor([[*t, *[0] * (width - len(t))] for t in targets], device=device)
    ids = torch.tensor([p.id for p in prompts], device=device)
    return Rollout(
        prompt_tokens=prompt_tokens,
        prompt_lengths=prompt_lengths,
        tokens=tokens,
        lengths=lengths,
        action_mask=length_mask(lengths, width),
        ended=torch.ones(len(prompts), dtype=torch.bool, device=device),
        group_ids=torch.arange(len(prompts), device=device),
        prompt_ids=ids,
        logprobs=torch.zeros(tokens.shape, device=device),
    )
