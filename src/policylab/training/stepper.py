"""Gradients and optimizer steps for any loss. The result does not depend on the micro-batches."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from policylab.data.rollout import Rollout
from policylab.distributed.sharding import whole
from policylab.errors import RunError, UserError, named
from policylab.models.policy import Policy
from policylab.training.means import Means
from policylab.training.optimizer import AdamW
from policylab.training.passes import Passes
from policylab.training.run_state import Progress
from policylab.training.skipping import WEIGHTS, cause_of, dump, is_finite
from policylab.user_code import shown

log = logging.getLogger(__name__)


class Stepper:
    """One optimizer, gradients accumulated over micro-batches, sums over processes.

    Attributes:
        skipped: updates skipped in the current iteration.
        skipped_in_a_row: consecutive skipped updates, by kind.
    """

    def __init__(self, optim: AdamW, passes: Passes, progress: Progress) -> None:
        self.policy: Policy = passes.policy
        self.optim = optim
        self.passes = passes
        self.runtime = passes.runtime
        self.recorder = passes.recorder
        self.progress = progress
        self.skipped = 0
        self.skipped_in_a_row: dict[str, int] = {}

    def accumulate(
        self,
        rollout: Rollout,
        rows: Tensor,
        loss_of: Callable[[Rollout], Tensor],
        units: Tensor | None = None,
    ) -> Means:
        """Accumulates the gradient of ``loss_of`` over micro-batches; only the last one synchronizes processes.

        ``loss_of`` takes some of the rows and returns their share of the loss, with the denominator of all processes.
        A process without rows takes part with `zero_loss`.

        Args:
            units: unit of each row of the rollout, ``[B]``; rows of one unit stay together. None: each row is its own.

        Returns:
            The means that ``loss_of`` added; they are also part of the iteration's.
        """

        def attempt() -> Means:
            parts = self.passes.cut_for_all(rollout, rows, units) or [rows]
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with nullcontext() if last else self.runtime.no_sync():
                    loss = loss_of(rollout.select(part)) if len(part) else self.zero_loss(rollout, loss_of)
                    check_loss(loss_of, loss)
                    self.runtime.collective |= last  # gradients are sent during the last backward pass
                    # data-parallel strategies average gradients, but these losses must be summed
                    self.runtime.backward(loss * self.runtime.world_size)
            return self.recorder.means

        return self.passes.retry_on_oom(attempt)

    def zero_loss(self, rollout: Rollout, loss_of: Callable[[Rollout], Tensor]) -> Tensor:
        """A zero that depends on every parameter: the loss of a process without rows.

        With sharded weights, this process must make the same passes as the others, so it evaluates one row with zero
        weight.
        """
        if self.runtime.sharded:
            row = rollout.select(torch.zeros(1, dtype=torch.long, device=rollout.tokens.device))
            with self.recorder.aside():
                return loss_of(row.replace(kept=torch.zeros_like(row.ended))) * 0.0
        return torch.stack([parameter.sum() for parameter in self.policy.parameters()]).sum() * 0.0

    def apply_gradients(
        self,
        rollout: Rollout,
        rows: Tensor,
        what: str = "update",
        groups: Mapping[str, list[nn.Parameter]] | None = None,
    ) -> bool:
        """Clips the gradient, makes a step, and clears the gradient.

        If loss or gradient is not finite on any process, all processes skip the update.

        Args:
            rollout, rows: what the gradient was computed from.
            what: kind of the update; consecutive skipped updates are counted by kind.
            groups: name of the norm -> parameters clipped together; None: those of `clipped_together`.

        Returns:
            Whether the step was taken.
        """
        optimizer, recorder = self.runtime.optimizer, self.recorder
        groups = self.clipped_together() if groups is None else groups
        norms = {
            name: whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
            for name, parameters in groups.items()
        }
        figures = [
            figure.to(self.runtime.device).double() for figure in (*norms.values(), *recorder.added.losses())
        ]
        finite = bool(torch.stack(figures).isfinite().all())
        if self.runtime.on_any(not finite):
            recorder.undo()
            self.skip_update(rollout, rows, what, recorder.added.not_finite())
            optimizer.zero_grad(set_to_none=True)
            return False
        limit = float("inf") if self.optim.max_grad_norm is None else self.optim.max_grad_norm
        for name, norm in norms.items():
            torch.nn.utils.clip_grads_with_norm_(groups[name], limit, norm)
            recorder.add(f"train/{name}", norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row.pop(what, None)
        return True

    def clipped_together(self) -> dict[str, list[nn.Parameter]]:
        """Name of the norm -> parameters clipped together: all, or policy and critic separately if they share none."""
        policy = self.policy
        if policy.critic is None or policy.critic.trains_trunk:
            return {"grad_norm": policy.actor_parameters() + policy.critic_parameters()}
        return {"grad_norm": policy.actor_parameters(), "critic_grad_norm": policy.critic_parameters()}

    def skip_update(self, rollout: Rollout, rows: Tensor, what: str, computed: list[str]) -> None:
        """Skips an update: counts it, saves its batch, and reports the cause.

        Args:
            computed: names of results of the update that are not finite.

        Raises:
            RunError: after ``optim.max_skipped`` in a row, or at once if the weights are not finite.
        """
        self.skipped += 1
        in_a_row = self.skipped_in_a_row[what] = self.skipped_in_a_row.get(what, 0) + 1
        iteration, rank = self.progress.iteration + 1, self.runtime.rank
        batch = rollout.select(rows) if len(rows) else None
        mine = cause_of(self.policy, batch, computed)
        if batch is not None:
            name = f"iteration_{iteration}" + (f"_{self.skipped}" if self.skipped > 1 else "")
            suffix = f"_rank{rank}" if self.runtime.world_size > 1 else ""
            content = {"iteration": iteration, "rank": rank, "not_finite": mine.what}
            dump(self.dumps, name, suffix, content, batch)
        cause = min(self.runtime.gather(mine), key=lambda cause: cause.depth)
        happened = f"iteration {iteration}: {cause.what} not finite"
        if cause.depth == WEIGHTS or in_a_row >= self.optim.max_skipped:
            raise RunError(
                f"{happened}, {in_a_row} of at most {self.optim.max_skipped} updates skipped in a row; {cause.advice}"
                f". The batches are in {self.dumps}; the last checkpoint is intact, and resume=RUN continues from it"
            )
        if rank == 0:
            log.warning(
                "%s; the update is skipped (%d in a row, the run ends at %d), its batch is saved in %s",
                *(happened, in_a_row, self.optim.max_skipped, self.dumps),
            )

    def take_skipped(self) -> int:
        """Returns how many updates the iteration has skipped, and resets the number to 0."""
        skipped, self.skipped = self.skipped, 0
        return skipped

    @property
    def dumps(self) -> Path:
        """Folder of the batches of skipped updates."""
        return self.runtime.folder / "dumps"

    def check_weights(self) -> None:
        """Raises RunError when the weights of any process are not finite."""
        bad = [name for name, weight in self.policy.named_parameters() if not is_finite(weight)]
        if any(self.runtime.gather(bool(bad))):
            raise RunError(
                f"after iteration {self.progress.iteration} the weights are not finite ({named(bad)}): an update was "
                "too large; lower optim.lr. The last checkpoint is from before that, and resume=RUN continues from it"
            )

    def reapply_settings(self) -> None:
        """Applies the config's settings, because a checkpoint restores the older ones with the optimizer's moments."""
        fresh = self.optim.build(self.policy).param_groups
        for group, settings in zip(self.runtime.optimizer.param_groups, fresh, strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})

    def set_learning_rate(self) -> float:
        """Sets this iteration's rate and returns the policy's."""
        factor = self.optim.factor(self.progress.iteration, self.progress.iterations)
        for group in self.runtime.optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.optim.lr * factor

    def state(self) -> dict[str, Any]:
        """The counts of consecutive skipped updates, which a resume must not reset."""
        return {"skipped_in_a_row": dict(self.skipped_in_a_row)}

    def load(self, state: dict[str, Any]) -> None:
        self.skipped_in_a_row = dict(state.get("skipped_in_a_row", {}))


def check_loss(loss_of: Callable[[Rollout], Tensor], loss: Any) -> None:
    """Refuses a loss that is no single number with a gradient.

    Raises:
        UserError: naming the function that returned it.
    """
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else shown(loss)
        raise UserError(
            f"{getattr(loss_of, '__qualname__', loss_of)} returned {what}; it must return the loss: a tensor of one "
            "number, without dimensions, that has a gradient"
        )
