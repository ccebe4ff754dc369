"""Gradients and optimizer steps, whatever the loss: the same answer however the work is cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from policylab.models.policy import Policy
from policylab.modules.means import Means
from policylab.modules.optimizer import AdamW
from policylab.rollouts.plan import BatchPlan


class ManualOptimization(LightningModule):
    """One optimizer, gradients accumulated over micro-batches, sums over processes.

    Attributes:
        iteration: finished iterations, of ``iterations`` in all.
    """

    def __init__(self, policy: Policy, optim: AdamW, plan: BatchPlan, iterations: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.policy = policy.eval()  # dropout is off in every forward pass
        self.optim = optim
        self.plan = plan
        self.iterations = iterations
        self.iteration = 0
        self._means = Means()  # of the iteration under way

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optim.build(self.policy)

    def micro_batches(self, rows: Tensor) -> Sequence[Tensor]:
        """Row indices cut into forward passes."""
        return rows.split(self.plan.micro_batch)

    def accumulate(self, rows: Tensor, loss_of: Callable[[Tensor], Tensor]) -> None:
        """Adds up the gradient of ``loss_of`` over micro-batches, synchronizing processes in the last one only.

        ``loss_of`` takes row indices and returns their share of the loss, its denominator already counted over
        all processes. A process without rows takes part with a zero that is tied to every parameter.
        """
        parts = self.micro_batches(rows) if len(rows) else [rows]
        for i, part in enumerate(parts):
            with nullcontext() if i == len(parts) - 1 else self.hold_synchronization():
                loss = loss_of(part) if len(part) else self.zero_loss()
                # Data-parallel strategies average gradients; the denominators want their sum.
                self.manual_backward(loss * self.trainer.world_size)

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
