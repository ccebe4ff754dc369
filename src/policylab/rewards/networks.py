"""Networks in rewards: they are frozen, and neither trained nor saved; their weights are loaded from their source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from policylab.rewards.base import takes_batch

if TYPE_CHECKING:
    from torch import nn


def is_network(reward: Any) -> bool:
    """Whether it is a ``torch.nn.Module``."""
    from torch import nn  # not at the top: processes that score start without it

    return isinstance(reward, nn.Module)


def networks(reward: Any) -> list[nn.Module]:
    """The reward itself, if it is a network; else the networks among its attributes and in lists and dicts there, if it
    has ``score(batch)``, and so is told the device. Those of another callable stay as they are."""
    if is_network(reward):
        return [reward]
    if not takes_batch(reward):
        return []
    values = getattr(reward, "__dict__", {}).values()
    held = [
        list(v.values()) if isinstance(v, dict) else v if isinstance(v, list | tuple) else [v] for v in values
    ]
    return [network for group in held for item in group for network in networks(item)]


def freeze(reward: Any) -> None:
    """Stops gradients, and sets evaluation mode, so that dropout does not change scores."""
    for network in networks(reward):
        network.requires_grad_(False).eval()


def move(reward: Any, device: Any) -> None:
    """Moves the networks to a device."""
    for network in networks(reward):
        network.to(device)
