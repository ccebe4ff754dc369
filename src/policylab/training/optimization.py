"""Gradients and optimizer steps, whatever the loss: the same answer however the work is cut."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning import LightningModule
from torch import Tensor, nn

from policylab.data.plan import BatchPlan
from policylab.data.rollout import Rollout
from policylab.distributed.sharding import release, whole
from policylab.errors import RunError, UserError
from policylab.models.policy import Policy
from policylab.rollouts.row_limit import is_out_of_memory
from policylab.training.means import Means
from policylab.training.micro_batches import cut, tokens_that_fit
from policylab.training.optimizer import AdamW
from policylab.training.skipping import WEIGHTS, cause_of, dump, is_finite, named

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class _Tried:
    """The micro-batches of the cut before; what they hold is asked for when memory has run out."""

    parts: list[Tensor]
    sizes: Tensor  #: tokens of each row of the rollout

    @property
    def rows(self) -> int:
        """Of the one with most."""
        return max(map(len, self.parts), default=0)

    @property
    def tokens(self) -> int:
        """Of the one with most."""
        return max((int(self.sizes[part].sum()) for part in self.parts), default=0)


class ManualOptimization(LightningModule):
    """One optimizer, gradients accumulated over micro-batches, sums over processes.

    Attributes:
        iteration: finished iterations, of ``iterations`` in all.
        sharded: whether each process holds a share of the weights alone, so that every pass is one of all processes.
        skipped: updates of the iteration under way that were left out.
        skipped_in_a_row: the last updates of each kind, as far as they were.
        whole_distributions: whether a forward pass leaves the probabilities of all words at each action.
    """

    whole_distributions: ClassVar[bool] = False

    def __init__(self, policy: Policy, optim: AdamW, plan: BatchPlan, iterations: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy.eval()  # dropout is off in every forward pass
        self.optim = optim
        self.plan = plan
        self.iterations = iterations
        self.iteration = 0
        self._means = Means()  # of the iteration under way
        self._micro_batch_tokens: int | None = None  # known once the policy is where it runs
        self._tried = _Tried([], torch.zeros(0))
        self._before = self._counted = Means()  # up to the last piece of work, and of it
        self.skipped = 0
        self.skipped_in_a_row: dict[str, int] = {}
        self.sharded = False
        self._others_wait = False  # for what this process has begun with them

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optim.build(self.policy)

    @property
    def micro_batch_tokens(self) -> int:
        """Tokens a forward pass and process, as far as is known."""
        if self._micro_batch_tokens is None:
            self._micro_batch_tokens = self.optim.micro_batch_tokens or tokens_that_fit(
                self.policy, whole_distributions=self.whole_distributions
            )
        return self._micro_batch_tokens

    def micro_batches(self, rollout: Rollout, rows: Tensor) -> list[Tensor]:
        """Row indices cut into forward passes; their order is not that of ``rows``."""
        parts = cut(rollout, rows, self.micro_batch_tokens, packs=self.policy.reader.packs)
        self._tried = _Tried(parts, rollout.lengths + rollout.prompt_lengths)
        return parts

    def passes(self, rollout: Rollout, rows: Tensor) -> list[Tensor]:
        """The `micro_batches`. Where weights are sharded they are as many on every process, with empty ones at the end:
        who has fewer would leave the others waiting."""
        parts = self.micro_batches(rollout, rows)
        if self.sharded:
            most = int(self.all_max(torch.tensor(len(parts))))
            parts += [rows[:0]] * (most - len(parts))
        return parts

    def accumulate(self, rollout: Rollout, rows: Tensor, loss_of: Callable[[Rollout], Tensor]) -> Means:
        """Adds up the gradient of ``loss_of`` over micro-batches, synchronizing processes in the last one only.

        ``loss_of`` takes some of the rows and returns their share of the loss, its denominator already counted over
        all processes. A process without rows takes part with a zero that is tied to every parameter.

        Returns:
            The means that ``loss_of`` added to; they are counted in the iteration's.
        """

        def attempt() -> Means:
            parts = self.passes(rollout, rows) or [rows]
            for i, part in enumerate(parts):
                last = i == len(parts) - 1
                with nullcontext() if last else self.hold_synchronization():
                    loss = loss_of(rollout.select(part)) if len(part) else self.idle(rollout, loss_of)
                    self._others_wait |= last  # gradients leave while the backward pass goes on
                    # Data-parallel strategies average gradients; the denominators want their sum.
                    self.manual_backward(loss * self.trainer.world_size)
            return self._means

        return self.within_memory(attempt)

    def within_memory(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` gives, which cuts its work by `micro_batches`. When memory runs out, all is done
        again in micro-batches of half the size, as if nothing had been; the size stays. The other processes just wait
        longer, unless it happens amid something that all take part in.

        Raises:
            UserError: when not even one sequence fits, or when the others would have to repeat it as well.
        """
        outer = self._means
        try:
            while True:
                self._means = Means()  # what a failed attempt has counted is forgotten
                self._others_wait = self.sharded
                try:
                    result = attempt()
                    self._before, self._counted = outer.copy(), self._means
                    outer.merge(self._means)
                    return result
                except RuntimeError as error:
                    if not is_out_of_memory(error):
                        raise
                    self._halve(error)
        finally:
            self._means = outer
            if self.sharded:
                self.release_weights()

    def _halve(self, error: RuntimeError) -> None:
        tried = self._tried
        if tried.rows <= 1 or (self._others_wait and self.trainer.world_size > 1):
            raise UserError(
                f"out of memory with {tried.rows} sequences of {tried.tokens} tokens in all in a forward pass; take "
                + (
                    "a smaller model, shorter sequences, or hardware.gradient_checkpointing=true"
                    if tried.rows <= 1
                    else f"optim.micro_batch_tokens={tried.tokens // 2}"
                )
            ) from error
        self.policy.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        tokens = min(self.micro_batch_tokens, tried.tokens) // 2
        warnings.warn(f"out of memory: from here on at most {tokens} tokens a forward pass", stacklevel=2)
        self._micro_batch_tokens = tokens

    def idle(self, rollout: Rollout, loss_of: Callable[[Rollout], Tensor]) -> Tensor:
        """A zero that is tied to every parameter: the loss of a process that has no rows, or none any more.

        Where weights are sharded it takes part in the passes of the others, with a row that counts nowhere.
        """
        if self.sharded:
            outer, self._means = self._means, Means()
            row = rollout.select(torch.zeros(1, dtype=torch.long, device=rollout.tokens.device))
            loss = loss_of(row.replace(kept=torch.zeros_like(row.ended)))
            self._means = outer
            return loss * 0.0
        return torch.stack([parameter.sum() for parameter in self.policy.parameters()]).sum() * 0.0

    def release_weights(self) -> None:
        """Lets go of the whole weights that sharded policies still hold after their passes."""
        for policy in self.children():
            release(policy)

    def hold_synchronization(self) -> AbstractContextManager[None]:
        """Keeps a backward pass from averaging gradients over processes."""
        strategy: Any = self.trainer.strategy
        return strategy.block_backward_sync() if self.trainer.world_size > 1 else nullcontext()

    def apply_gradients(self, rollout: Rollout, rows: Tensor, what: str = "update") -> bool:
        """Clips, steps, and clears. An update whose loss or gradient is not finite is left out, on all processes.

        Args:
            rollout, rows: what the gradient was taken of.
            what: name of the series of updates that this is one of.

        Returns:
            Whether the step was taken.
        """
        optimizer: Any = self.optimizers()
        together = self.clipped_together()
        norms = {
            name: whole(torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
            for name, parameters in together.items()
        }
        figures = [figure.to(self.device).double() for figure in (*norms.values(), *self._counted.losses())]
        finite = bool(torch.stack(figures).isfinite().all())
        if self.on_any(not finite):
            self._means = self._before
            self.leave_out(rollout, rows, what, self._counted.not_finite())
            optimizer.zero_grad(set_to_none=True)
            return False
        limit = float("inf") if self.optim.max_grad_norm is None else self.optim.max_grad_norm
        for name, norm in norms.items():
            torch.nn.utils.clip_grads_with_norm_(together[name], limit, norm)
            self._means.add(f"train/{name}", norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        self.skipped_in_a_row.pop(what, None)
        return True

    def leave_out(self, rollout: Rollout, rows: Tensor, what: str, computed: list[str]) -> None:
        """Counts an update that is not made, keeps its batch, and tells why.

        Args:
            computed: what of all that the update has computed is not finite.

        Raises:
            RunError: after ``optim.max_skipped`` in a row, or at once where no later one can be better.
        """
        self.skipped += 1
        in_a_row = self.skipped_in_a_row[what] = self.skipped_in_a_row.get(what, 0) + 1
        iteration = self.iteration + 1
        batch = rollout.select(rows) if len(rows) else None
        mine = cause_of(self.policy, batch, computed)
        if batch is not None:
            name = f"iteration_{iteration}" + (f"_{self.skipped}" if self.skipped > 1 else "")
            suffix = f"_rank{self.global_rank}" if self.trainer.world_size > 1 else ""
            content = {"iteration": iteration, "rank": self.global_rank, "not_finite": mine.what}
            dump(self.dumps, name, suffix, content, batch)
        cause = min(self.from_all(mine), key=lambda cause: cause.depth)
        happened = f"iteration {iteration}: {cause.what} not finite"
        if cause.depth == WEIGHTS or in_a_row >= self.optim.max_skipped:
            raise RunError(
                f"{happened}, {in_a_row} of at most {self.optim.max_skipped} updates left out in a row; {cause.advice}"
                f". The batches are in {self.dumps}; the last checkpoint is sound, and resume=RUN goes on from there"
            )
        if self.trainer.is_global_zero:
            log.warning(
                "%s; the update is left out (%d in a row, the run ends at %d), its batch kept in %s",
                *(happened, in_a_row, self.optim.max_skipped, self.dumps),
            )

    @property
    def dumps(self) -> Path:
        """Where batches of updates that were left out are kept."""
        return Path(self.trainer.default_root_dir) / "dumps"

    def demand_finite_weights(self) -> None:
        """Raises RunError when an update has spoilt the weights of some process."""
        bad = [name for name, weight in self.policy.named_parameters() if not is_finite(weight)]
        if any(self.from_all(bool(bad))):
            raise RunError(
                f"after iteration {self.iteration} the weights are not finite ({named(bad)}): an update was too large; "
                "lower optim.lr. The last checkpoint is from before that, and resume=RUN goes on from there"
            )

    def clipped_together(self) -> dict[str, list[nn.Parameter]]:
        """What has a norm of its own: everything, or the policy apart from a critic that never moves it."""
        policy = self.policy
        if policy.critic is None or policy.critic.trains_trunk:
            return {"grad_norm": policy.actor_parameters() + policy.critic_parameters()}
        return {"grad_norm": policy.actor_parameters(), "critic_grad_norm": policy.critic_parameters()}

    def reapply_optimizer_settings(self) -> None:
        """A checkpoint brings the moments back, and with them settings that the config may have changed since."""
        optimizer: Any = self.optimizers()
        fresh = self.optim.build(self.policy).param_groups
        for group, settings in zip(optimizer.param_groups, fresh, strict=True):
            group.update({name: value for name, value in settings.items() if name != "params"})

    def set_learning_rate(self) -> float:
        """Sets this iteration's rate and returns the policy's."""
        factor = self.optim.factor(self.iteration, self.iterations)
        optimizer: Any = self.optimizers()
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        return self.optim.lr * factor

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        return self._over_processes(x, "sum")

    def all_max(self, x: Tensor) -> Tensor:
        """Maximum over processes."""
        return self._over_processes(x, "max")

    def on_any(self, flag: bool) -> bool:
        """Whether it is true on some process."""
        return flag if self.trainer.world_size == 1 else bool(self.all_max(torch.tensor(float(flag))) > 0)

    def from_all(self, item: T) -> list[T]:
        """What each process gives, in the order of their ranks; anything that can be pickled."""
        items = [item] * self.trainer.world_size
        if len(items) > 1:
            self._others_wait = True
            torch.distributed.all_gather_object(items, item)
        return items

    def _over_processes(self, x: Tensor, operation: str) -> Tensor:
        """The same on all processes, to the bit, so that what it decides is decided alike."""
        if self.trainer.world_size == 1:
            return x
        self._others_wait = True
        # On the module's device, whose backend sends it. Lightning's `reduce` would add a barrier.
        whole = x.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(whole, getattr(torch.distributed.ReduceOp, operation.upper()))
        return whole.to(x.device)
