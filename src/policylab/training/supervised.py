"""Supervised training on the task's completions, using the same rollout layout and training loop."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from policylab.algorithms import Supervised
from policylab.data.rollout import Prompt, PromptBatch, Rollout
from policylab.functional.masks import length_mask
from policylab.functional.reduction import token_sum
from policylab.rollouts.engine import pad_left
from policylab.training.means import TRAINED
from policylab.training.module import TrainingModule
from policylab.training.parts import Parts


class SupervisedTraining(TrainingModule):
    """Maximum likelihood of the completions in the data; validation adds the loss on held-out ones."""

    def __init__(self, algorithm: Supervised, parts: Parts) -> None:
        super().__init__(parts)
        self.algorithm = algorithm

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: one optimizer step on one batch of examples."""
        started = time.perf_counter()
        lr = self.stepper.set_learning_rate()
        with self.recorder.phase("update"):
            grid = demonstrations(batch.prompts, self.algorithm.loss_on, self.device)
            rows = torch.arange(len(grid), device=self.device)
            tokens = self.runtime.all_sum(grid.action_mask.sum())

            def loss_of(piece: Rollout) -> Tensor:
                negative = self.negative_logprobs(piece)
                self.recorder.add("train/loss", negative, piece.action_mask)
                return token_sum(negative, piece.action_mask, tokens.float())

            self.stepper.accumulate(grid, rows, loss_of)
            if self.stepper.apply_gradients(grid, rows):
                self.recorder.add(TRAINED, grid.action_mask.sum())
        self.finish_iteration({"train/lr": lr, "tokens": tokens}, started)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Adds the loss on the held-out completions, if all prompts have one."""
        # checked on all prompts, so that all processes make the same passes
        if all(prompt.target for prompt in self.validator.prompts):
            grid = demonstrations(batch.prompts, self.algorithm.loss_on, self.device)
            negative = self.passes.per_token(grid, self.negative_logprobs)
            self.validator.means.add("val/loss", negative, grid.action_mask)
        super().validation_step(batch, batch_idx)

    def negative_logprobs(self, grid: Rollout) -> Tensor:
        """The loss per token, ``[B, T]``."""
        return -self.policy.logprobs_of(grid, temperature=1.0)


def demonstrations(prompts: Sequence[Prompt], loss_on: str, device: torch.device) -> Rollout:
    """The completions of a data set in the layout of a rollout, with every token an action.

    With ``loss_on="full"`` the prompt's tokens after the first are actions too.
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
