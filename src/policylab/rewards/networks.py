"""A reward that is a network: its weights come from where the user has them from, and are neither trained nor saved."""

from __future__ import annotations

from typing import Any

from policylab.rewards.base import Reward


def frozen(reward: Reward) -> Reward:
    """The reward itself; a network is frozen and in evaluation mode, so that scores are not drawn."""
    if is_network(reward):
        reward.requires_grad_(False).eval()  # type: ignore[attr-defined]
    return reward


def move(reward: Reward | None, device: Any) -> None:
    """Moves a network to a device; whatever else is a reward stays where it is."""
    if is_network(reward):
        reward.to(device)  # type: ignore[attr-defined]


def is_network(reward: Reward | None) -> bool:
    """Whether it is a ``torch.nn.Module``."""
    from torch import nn  # not before: processes that score start without it

    return isinstance(reward, nn.Module)
