"""Passes through the policy in micro-batches, which become smaller when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.errors import UserError, counted
from policylab.models.policy import Policy
from policylab.rollouts.row_limit import is_out_of_memory
from policylab.training.micro_batches import cut, tokens_that_fit
from policylab.training.recorder import Recorder
from policylab.training.runtime import Runtime

T = TypeVar("T")


class Passes:
    """Cuts rollouts into micro-batches, and repeats work in smaller ones when memory runs out.

    Args:
        asked: configured tokens of a micro-batch; None: as many as should fit in memory.
        whole_distributions: whether a pass holds the probabilities of the whole vocabulary at each action.
    """

    def __init__(
        self, policy: Policy, asked: int | None, recorder: Recorder, *, whole_distributions: bool
    ) -> None:
        self.policy = policy
        self.asked = asked
        self.recorder = recorder
        self.runtime: Runtime = recorder.runtime
        self._whole_distributions = whole_distributions
        self._tokens: int | None = None  # set once the policy is on its device
        self._last: tuple[list[Tensor], Tensor, Tensor | None] = ([], torch.zeros(0), None)

    @property
    def tokens(self) -> int:
        """Most tokens of a micro-batch on this process: the configured number, or the smaller one found after
        out-of-memory."""
        if self._tokens is None:
            self._tokens = self.asked or tokens_that_fit(
                self.policy, whole_distributions=self._whole_distributions
            )
        return self._tokens

    @tokens.setter
    def tokens(self, tokens: int) -> None:
        self._tokens = tokens

    def cut(self, rollout: Rollout, rows: Tensor, units: Tensor | None = None) -> list[Tensor]:
        """The rows in micro-batches, as `policylab.training.micro_batches.cut`; their order is not that of ``rows``."""
        parts = cut(rollout, rows, self.tokens, packs=self.policy.reader.packs, units=units)
        self._last = (parts, rollout.lengths + rollout.prompt_lengths, units)
        return parts

    def cut_for_all(self, rollout: Rollout, rows: Tensor, units: Tensor | None = None) -> list[Tensor]:
        """`cut` for passes with sharded weights: appends empty micro-batches, so that all processes make as many
        passes."""
        parts = self.cut(rollout, rows, units)
        if self.runtime.sharded:
            most = int(self.runtime.all_max(torch.tensor(len(parts))))
            parts += [rows[:0]] * (most - len(parts))
        return parts

    def pieces(self, rollout: Rollout, rows: Tensor) -> list[Rollout]:
        """The micro-batches of the rows, as rollouts; empty without rows."""
        return [rollout.select(part) for part in self.cut(rollout, rows)]

    @torch.no_grad()
    def per_token(self, rollout: Rollout, evaluate: Callable[[Rollout], Tensor]) -> Tensor:
        """``evaluate`` over micro-batches, merged to the rollout's shape, ``[..., B, T]``."""
        rows = torch.arange(len(rollout), device=rollout.tokens.device)

        def attempt() -> Tensor:
            parts = self.cut_for_all(rollout, rows)
            figures = [evaluate(rollout.select(part if len(part) else rows[:1])) for part in parts]
            whole = figures[0].new_zeros(*figures[0].shape[:-2], *rollout.tokens.shape)
            for part, values in zip(parts, figures, strict=True):
                if len(part):
                    whole[..., part, : values.shape[-1]] = values
            return whole

        return self.retry_on_oom(attempt)

    def retry_on_oom(self, attempt: Callable[[], T]) -> T:
        """The result of ``attempt``, which splits its work by `cut`.

        When memory runs out, the gradients and means of the attempt are dropped, and it is repeated with micro-batches
        of half the size, which is kept from then on. There is no retry once the attempt has taken part in a
        collective, because the other processes would not repeat it.

        Raises:
            UserError: when a single unit does not fit, or after a collective.
        """
        try:
            while True:
                self.runtime.collective = self.runtime.sharded
                try:
                    with self.recorder.aside() as added:
                        result = attempt()
                    self.recorder.merge(added)
                    return result
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    self._halve(error)
        finally:
            if self.runtime.sharded:
                self.runtime.release_weights()

    def state(self) -> dict[str, Any]:
        """The configured number of tokens, and the number found to fit."""
        return {"micro_batch_tokens": (self.asked, self.tokens)}

    def load(self, state: dict[str, Any]) -> None:
        """Takes the saved run's size, unless the config has another one now."""
        asked, found = state.get("micro_batch_tokens", (None, None))
        if asked == self.asked:
            self._tokens = found

    def _halve(self, error: RuntimeError) -> None:
        parts, sizes, units = self._last  # summed only here: reading it waits for the device
        rows = max(map(len, parts), default=0)
        tokens = max((int(sizes[part].sum()) for part in parts), default=0)
        divisible = any(len(part if units is None else units[part].unique()) > 1 for part in parts)
        if not divisible or (self.runtime.collective and self.runtime.world_size > 1):
            advice = (
                f"optim.micro_batch_tokens={tokens // 2}"
                if divisible
                else "a smaller model, shorter sequences, or hardware.gradient_checkpointing=true"
            )
            raise UserError(
                f"out of memory with {counted(rows, 'sequence')} of {counted(tokens, 'token')} in all in a "
                f"forward pass; take {advice}"
            ) from error
        self.policy.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        self.tokens = min(self.tokens, tokens) // 2
        warnings.warn(f"out of memory: from now on at most {self.tokens} tokens a forward pass", stacklevel=2)
