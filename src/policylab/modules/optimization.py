"""Gradients and optimizer steps, whatever the loss: the same answer however the work is cut."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from lightning import LightningModule
from torch import Tensor, nn

from policylab.errors import UserError
from policylab.models.policy import Policy
from policylab.modules.means import Means
from policylab.modules.micro_batches import cut, tokens_that_fit
from policylab.modules.optimizer import AdamW
from policylab.rollouts.plan import BatchPlan
from policylab.rollouts.types import Rollout

T = TypeVar("T")


@dataclass(frozen=True)
class _Tried:
    """The micro-batches of the cut before."""

    rows: int  #: of the one with most
    tokens: int  #: of the one with most


class ManualOptimization(LightningModule):
    """One optimizer, gradients accumulated over micro-batches, sums over processes.

    Attributes:
        iteration: finished iterations, of ``iterations`` in all.
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
        self._tried = _Tried(0, 0)

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
        parts = cut(rollout, rows, self.micro_batch_tokens, packs=self.policy.packs)
        sizes = rollout.lengths + rollout.prompt_lengths
        self._tried = _Tried(
            rows=max(map(len, parts), default=0),
            tokens=max((int(sizes[part].sum()) for part in parts), default=0),
        )
        return parts

    def accumulate(self, rollout: Rollout, rows: Tensor, loss_of: Callable[[Rollout], Tensor]) -> Means:
        """Adds up the gradient of ``loss_of`` over micro-batches, synchronizing processes in the last one only.

        ``loss_of`` takes some of the rows and returns their share of the loss, its denominator already counted over
        all processes. A process without rows takes part with a zero that is tied to every parameter.

        Returns:
            The means that ``loss_of`` added to; they are counted in the iteration's.
        """

        def attempt() -> Means:
            parts = self.micro_batches(rollout, rows) or [rows]
            for i, part in enumerate(parts):
                with nullcontext() if i == len(parts) - 1 else self.hold_synchronization():
                    loss = loss_of(rollout.select(part)) if len(part) else self.zero_loss()
                    # Data-parallel strategies average gradients; the denominators want their sum.
                    self.manual_backward(loss * self.trainer.world_size)
            return self._means

        return self.within_memory(attempt)

    def within_memory(self, attempt: Callable[[], T]) -> T:
        """What ``attempt`` gives, which cuts its work by `micro_batches`. When a GPU's memory runs out, all is done
        again in micro-batches of half the size, as if nothing had been; the size stays.

        Raises:
            UserError: when not even one sequence fits, or when several processes would have to agree.
        """
        outer = self._means
        try:
            while True:
                self._means = Means()  # what a failed attempt has counted is forgotten
                try:
                    result = attempt()
                    outer.merge(self._means)
                    return result
                except torch.OutOfMemoryError as error:
                    self._halve(error)
        finally:
            self._means = outer

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        tried = self._tried
        if tried.rows <= 1 or self.trainer.world_size > 1:
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

    def zero_loss(self) -> Tensor:
        """A zero that is tied to every parameter."""
        return torch.stack([parameter.sum() for parameter in self.policy.parameters()]).sum() * 0.0

    def hold_synchronization(self) -> AbstractContextManager[None]:
        """Keeps a backward pass from averaging gradients over processes."""
        strategy: Any = self.trainer.strategy
        return strategy.block_backward_sync() if self.trainer.world_size > 1 else nullcontext()

    def apply_gradients(self) -> None:
        """Clips, steps, and clears."""
        optimizer: Any = self.optimizers()
        limit = float("inf") if self.optim.max_grad_norm is None else self.optim.max_grad_norm
        for name, parameters in self.clipped_together().items():
            norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"train/{name} is {norm.item()} in iteration {self.iteration + 1}; lower optim.lr, or run with "
                    "debug=nan to find the operation"
                )
            self._means.add(f"train/{name}", norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

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

    def _over_processes(self, x: Tensor, operation: str) -> Tensor:
        if self.trainer.world_size == 1:
            return x
        return self.trainer.strategy.reduce(x.clone(), reduce_op=operation)
