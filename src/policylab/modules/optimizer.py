"""The optimizer and its schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

from policylab.errors import UserError, demand
from policylab.models.policy import Policy


@dataclass(frozen=True)
class AdamW:
    """Decoupled weight decay (arXiv:1711.05101), one optimizer with a parameter group each for policy and critic.

    Args:
        lr: learning rate of the policy, after warm-up.
        critic_lr: learning rate of the value head; None takes ``lr``.
        betas: decay of the gradient's first and second moments.
        eps: added to the root of the second moment.
        weight_decay: on matrices only, never on biases and norms.
        max_grad_norm: gradients are scaled down to this norm; None leaves them.
        schedule: what happens after warm-up.
        warmup: iterations over which the rate rises linearly.
        micro_batch_size: sequences a forward pass and process; None takes the whole minibatch. It changes
            memory, never results.
    """

    lr: float
    critic_lr: float | None
    betas: tuple[float, float]
    eps: float
    weight_decay: float
    max_grad_norm: float | None
    schedule: Literal["constant", "linear", "cosine"]
    warmup: int
    micro_batch_size: int | None

    def __post_init__(self) -> None:
        demand("optim.lr", self.lr, 0)
        demand("optim.critic_lr", self.critic_lr, 0)
        demand("optim.eps", self.eps, 0, above=True)
        demand("optim.weight_decay", self.weight_decay, 0)
        demand("optim.max_grad_norm", self.max_grad_norm, 0, above=True)
        demand("optim.warmup", self.warmup, 0)
        demand("optim.micro_batch_size", self.micro_batch_size, 1)
        if len(self.betas) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in self.betas):
            raise UserError(f"optim.betas is {self.betas}; it must be two numbers from 0 to below 1")
        if self.schedule not in ("constant", "linear", "cosine"):
            raise UserError(f"optim.schedule is {self.schedule!r}; take constant, linear or cosine")

    def build(self, policy: Policy) -> torch.optim.Optimizer:
        """The optimizer over everything in the policy that has a gradient."""
        head = [] if policy.value_head is None else list(policy.value_head.parameters())
        in_head = {id(p) for p in head}
        body = [p for p in policy.parameters() if p.requires_grad and id(p) not in in_head]
        groups = [
            {
                "params": [p for p in body if p.ndim >= 2],
                "weight_decay": self.weight_decay,
                "base_lr": self.lr,
            },
            {"params": [p for p in body if p.ndim < 2], "weight_decay": 0.0, "base_lr": self.lr},
            {
                "params": head,
                "weight_decay": 0.0,
                "base_lr": self.lr if self.critic_lr is None else self.critic_lr,
            },
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=self.lr,
            betas=(self.betas[0], self.betas[1]),
            eps=self.eps,
            fused=True,
        )

    def factor(self, iteration: int, iterations: int) -> float:
        """Share of the learning rate in iteration ``iteration`` (0-based) of ``iterations``: no state to save."""
        if iteration < self.warmup:
            return (iteration + 1) / (self.warmup + 1)
        progress = (iteration - self.warmup) / max(1, iterations - self.warmup)
        if self.schedule == "linear":
            return 1 - progress
        if self.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * progress))
        return 1.0
