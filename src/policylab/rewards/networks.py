"""Networks in rewards: they are frozen, and neither trained nor saved; their weights are loaded from their source."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from policylab.rewards.base import takes_batch

if TYPE_CHECKING:
    from torch import nn


def is_network(reward: Any) -> bool:
    """Whether it is a ``torch.nn.Module``."""
    from torch import nn  # not at the top: processes that score start without it

    return isinstance(reward, nn.Module)


def networks(reward: Any, *, told_device: bool = False, above: tuple[Any, ...] = ()) -> list[nn.Module]:
    """The reward itself, if it is a network; else the networks among its attributes and, for a partial, its arguments,
    and in lists and dicts there.

    Args:
        told_device: only networks that are rewards themselves or belong to a reward with ``score(batch)``.
        above: rewards that contain this one, which are not searched again.
    """
    if is_network(reward):
        return [reward]
    searched = takes_batch(reward) or (callable(reward) and not isinstance(reward, type) and not told_device)
    if not searched or any(reward is other for other in above):
        return []
    values = [*getattr(reward, "__dict__", {}).values()]
    if isinstance(reward, functools.partial):
        values += [reward.func, reward.args, reward.keywords]
    held = [
        list(v.values()) if isinstance(v, dict) else v if isinstance(v, list | tuple) else [v] for v in values
    ]
    above = (*above, reward)
    return [
        network
        for group in held
        for item in group
        for network in networks(item, told_device=told_device, above=above)
    ]


def freeze(reward: Any) -> None:
    """Turns off gradients, and sets evaluation mode, so that dropout does not change scores."""
    for network in networks(reward):
        network.requires_grad_(False).eval()


def move(reward: Any, device: Any) -> None:
    """Moves the networks to a device. Networks of a function of completions are not moved: it does not get the device,
    and may give them tensors on the CPU."""
    for network in networks(reward, told_device=True):
        network.to(device)
