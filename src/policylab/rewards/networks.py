"""A reward that is a network: its weights come from where the user has them from, and are neither trained nor saved."""

from __future__ import annotations

from typing import Any


def frozen(reward: Any) -> Any:
    """The reward itself; a network is frozen and in evaluation mode, so that dropout does not change scores."""
    if is_network(reward):
        reward.requires_grad_(False).eval()
    return reward


def move(reward: Any, device: Any) -> None:
    """Moves a network to a device; any other reward stays where it is."""
    if is_network(reward):
        reward.to(device)


def is_network(reward: Any) -> bool:
    """Whether it is a ``torch.nn.Module``."""
    from torch import nn  # not before: processes that score start without it

    return isinstance(reward, nn.Module)
