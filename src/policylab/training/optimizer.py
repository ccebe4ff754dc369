"""The optimizer and its schedule."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from policylab.errors import UserError, check_range
from policylab.models.policy import Policy


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (arXiv:1711.05101), one optimizer with a parameter group each for policy and critic.

    Args:
        lr: learning rate of the policy, after warm-up.
        critic_lr: learning rate of the critic's own weights (value head, layers); None: ``lr``.
        betas: decay of the gradient's first and second moments.
        eps: added to the root of the second moment.
        weight_decay: on matrices only, never on biases, norms and the value head.
        max_grad_norm: gradients are clipped to this norm; None: no clipping.
        schedule: course of the rate after warm-up.
        warmup: iterations over which the rate rises linearly.
        frozen_layers: the embeddings and this many of the lowest layers are frozen. They need no gradient, and the
            reference shares them. 0: all layers train.
        micro_batch_tokens: tokens per forward pass and process; None: as many as should fit in memory. It changes
            memory, never results.
        max_skipped: this many updates skipped in a row, because loss or gradient is not finite, end the run.
    """

    lr: float
    critic_lr: float | None
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float | None
    schedule: Literal["constant", "linear", "cosine"]
    warmup: int
    frozen_layers: int
    micro_batch_tokens: int | None
    max_skipped: int

    def __post_init__(self) -> None:
        check_range("optim.lr", self.lr, 0)
        check_range("optim.critic_lr", self.critic_lr, 0)
        check_range("optim.eps", self.eps, 0, above=True)
        check_range("optim.weight_decay", self.weight_decay, 0)
        check_range("optim.max_grad_norm", self.max_grad_norm, 0, above=True)
        check_range("optim.warmup", self.warmup, 0)
        check_range("optim.frozen_layers", self.frozen_layers, 0)
        check_range("optim.micro_batch_tokens", self.micro_batch_tokens, 1)
        check_range("optim.max_skipped", self.max_skipped, 1)
        if len(self.betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in self.betas):
            raise UserError(f"optim.betas is {self.betas}; it must be two numbers from 0 to below 1")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"optim.schedule is {self.schedule!r}; take constant, linear or cosine")

    def build(self, policy: Policy) -> torch.optim.Optimizer:
        """The optimizer over all trainable weights of the policy: `MasterAdamW` if some of them are below fp32."""
        critic_lr = self.lr if self.critic_lr is None else self.critic_lr
        head = [] if policy.critic is None else list(policy.critic.head.parameters())
        groups = [
            *self._groups(policy.actor_parameters(), self.lr, undecayed=[]),
            *self._groups(policy.critic_parameters(), critic_lr, undecayed=head),
        ]
        low = any(_is_low(p) for group in groups for p in group["params"])
        return (MasterAdamW if low else torch.optim.AdamW)(
            [g for g in groups if g["params"]],
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            fused=True,
        )

    def _groups(
        self, parameters: list[nn.Parameter], lr: float, undecayed: list[nn.Parameter]
    ) -> list[dict[str, Any]]:
        """Two groups: matrices, with weight decay, and the rest, without."""
        spared = set(map(id, undecayed))
        matrices = [p for p in parameters if p.ndim >= 2 and id(p) not in spared]
        rest = [p for p in parameters if p.ndim < 2 or id(p) in spared]
        return [
            {"params": matrices, "weight_decay": self.weight_decay, "base_lr": lr},
            {"params": rest, "weight_decay": 0.0, "base_lr": lr},
        ]

    def factor(self, iteration: int, iterations: int) -> float:
        """Factor of the learning rate in iteration ``iteration`` (0-based) of ``iterations``; a pure function, so
        checkpoints hold no scheduler state."""
        if iteration < self.warmup:
            return (iteration + 1) / (self.warmup + 1)
        progress = (iteration - self.warmup) / max(1, iterations - self.warmup)
        if self.schedule == "linear":
            return 1 - progress
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0


class MasterAdamW(torch.optim.AdamW):
    """AdamW that keeps an fp32 copy (``master``) of each weight of lower precision. Steps update the copy, and
    the weight is the rounded copy. The moments are in fp32 too.

    "Mixed Precision Training", arXiv:1710.03740, section 3.1. bf16 has 8 bits of precision: added to the weight itself,
    a step below 1/512 of it would be lost.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. It updates one weight at a time, so that only one gradient at a time is copied to fp32."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self._state_of(weight)
                master = state.get("master", weight)
                adamw(
                    [master],
                    [weight.grad.to(master.dtype)],
                    [state["exp_avg"]],
                    [state["exp_avg_sq"]],
                    [],
                    [state["step"]],
                    fused=True,
                    amsgrad=False,
                    beta1=beta1,
                    beta2=beta2,
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
                if master is not weight:
                    weight.copy_(master)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state in fp32; torch would cast it to each weight's precision."""
        super().load_state_dict(state_dict)
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for index, saved in state_dict["state"].items():
            weight = weights[index]
            for name, value in saved.items() if _is_low(weight) else ():
                if isinstance(value, Tensor):
                    self.state[weight][name] = value.to(weight.device, torch.float32)

    def _state_of(self, weight: Tensor) -> dict[str, Any]:
        state = self.state[weight]
        if "master" not in state and _is_low(weight):
            state["master"] = weight.detach().float()
        if "step" not in state:
            like = state.get("master", weight)
            state["step"] = torch.zeros((), device=weight.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(like), torch.zeros_like(like)
        return state


def state_bytes(count: int, number: int) -> float:
    """Bytes of optimizer state for ``count`` weights, ``number`` bytes each: two fp32 moments, and an fp32 copy of
    weights below fp32."""
    return 4.0 * count * (3 if number < 4 else 2)


def _is_low(weight: Tensor) -> bool:
    return weight.dtype.itemsize < torch.float32.itemsize
