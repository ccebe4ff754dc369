"""Networks in rewards: they are frozen, and neither trained nor saved; their weights are loaded from their source."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from policylab.errors import UserError
from policylab.rewards.base import reward_name, takes_batch

if TYPE_CHECKING:
    from torch import nn


def is_network(reward: Any) -> bool:
    """Whether it is a ``torch.nn.Module``."""
    torch = sys.modules.get("torch")  # not imported here: processes that score text run without it
    return torch is not None and isinstance(reward, torch.nn.Module)


def networks(reward: Any, *, told_device: bool = False) -> list[nn.Module]:
    """The reward itself, if it is a network; else those that `held_by` finds in it, and in what it holds.

    Args:
        told_device: only networks that are rewards themselves or belong to a reward with ``score(batch)``.
    """
    found, seen, waiting = list[Any](), set[int](), [reward]
    while waiting:
        held = waiting.pop()
        if id(held) in seen:  # rewards may refer to each other
            continue
        seen.add(id(held))
        if is_network(held):
            found.append(held)
        elif takes_batch(held) or (callable(held) and not isinstance(held, type) and not told_device):
            waiting += held_by(held)
    return found


def held_by(reward: Any) -> Iterator[Any]:
    """The values of its attributes, those in ``__slots__`` too, and a partial's function and arguments. Lists, tuples
    and dicts among them give their items."""
    state = object.__getstate__(reward)  # the attributes, and with __slots__ a pair of both kinds
    kinds = state if isinstance(state, tuple) else (state,)
    values = [value for attributes in kinds for value in (attributes or {}).values()]
    if isinstance(reward, functools.partial):
        values += [reward.func, reward.args, reward.keywords]
    for value in values:
        if isinstance(value, dict):
            yield from value.values()
        elif isinstance(value, list | tuple):
            yield from value
        else:
            yield value


def freeze(reward: Any) -> None:
    """Turns off gradients, and sets evaluation mode, so that dropout does not change scores."""
    for network in networks(reward):
        network.requires_grad_(False).eval()


def freeze_late(reward: Any) -> None:
    """Stops gradients of networks that the reward has made while it scored for the first time.

    Raises:
        UserError: when one of them has scored in training mode, in which dropout changes scores.
    """
    for network in networks(reward):
        if any(module.training for module in network.modules()):
            raise UserError(
                f"reward {reward_name(reward)} has scored with a network in training mode "
                f"({type(network).__name__}), in which dropout changes scores; make it in __init__, or call eval() on "
                "it"
            )
        network.requires_grad_(False)


def move(reward: Any, device: Any) -> None:
    """Moves the networks to a device. Networks of a function of completions are not moved: it does not get the device,
    and may give them tensors on the CPU."""
    for network in networks(reward, told_device=True):
        network.to(device)
