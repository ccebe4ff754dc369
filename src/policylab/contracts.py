"""Checks user-defined parts (families, engines, readers, rewards): their members and return types.

Members are checked when the part is built, a return value when it is first used.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import NoneType
from typing import Any, TypeVar, get_type_hints

from policylab.errors import UserError
from policylab.user_code import call, shown

T = TypeVar("T")

#: The methods of a part whose state checkpoints hold.
STATE = ("state_dict", "load_state_dict")


def returned(owner: str, value: Any, kind: type[T]) -> T:
    """The return value of a user-defined method.

    Args:
        owner: name of the method, for messages.
        kind: the required type.

    Raises:
        UserError: when it is of another type.
    """
    if isinstance(value, kind):
        return value
    wanted = "nothing, and raise UserError to refuse" if kind is NoneType else kind.__name__
    raise UserError(f"{owner} returned {shown(value)}; it must return {wanted}")


def check_grid(what: str, given: Any, mask: Any) -> None:
    """Refuses a value that is not a tensor with a number for each token; another shape might be broadcast.

    Args:
        what: name of the value, for messages.
        mask: a tensor of the required shape, ``[B, T]``.

    Raises:
        UserError: naming both shapes.
    """
    if (shape := getattr(given, "shape", None)) != mask.shape:
        found = shown(given) if shape is None else f"a tensor of shape {tuple(shape)}"
        raise UserError(
            f"{what}: {found}; it must be a tensor of shape {tuple(mask.shape)}, a number for each token"
        )


def check_members(owner: str, part: object, protocol: type, later: Sequence[str] = ()) -> None:
    """Refuses a part that lacks a member of its protocol.

    Args:
        owner: kind of the part, for messages; the name of its class follows.
        later: members that may be set after construction.

    Raises:
        UserError: naming the missing members.
    """
    members = {name for name in vars(protocol) if not name.startswith("_")} | inspect.get_annotations(
        protocol
    ).keys()
    # looks at the class first, because evaluating a property may be slow or fail
    missing = [n for n in members - set(later) if not (hasattr(type(part), n) or hasattr(part, n))]
    if missing:
        raise UserError(
            f"{owner} {type(part).__name__} has no {' and no '.join(sorted(missing))}; see "
            f"{protocol.__module__}.{protocol.__name__}"
        )


def check_overrides(kind: type, base: type) -> None:
    """Wraps the public methods of ``base`` that a user-defined class overrides.

    A wrapped method reports its exceptions as `policylab.user_code.call` does, and refuses a return value whose type is
    not the one that ``base`` annotates.

    Raises:
        UserError: when the class overrides a method with something that is not a method.
    """
    if kind.__module__.startswith("policylab."):
        return
    for name, declared in vars(base).items():
        if name.startswith("_") or name not in vars(kind):
            continue
        if not inspect.isfunction(function := vars(kind)[name]):
            raise UserError(f"{kind.__name__}.{name} is {shown(function)}; it must be a method")
        setattr(kind, name, _checked(function, get_type_hints(declared)["return"]))


def _checked(function: Callable[..., Any], kind: type) -> Callable[..., Any]:
    @functools.wraps(function)
    def checked(self: Any, *arguments: Any, **named: Any) -> Any:
        owner = f"{type(self).__name__}.{function.__name__}"
        return returned(owner, call(owner, functools.partial(function, self, *arguments, **named)), kind)

    return checked


def check_state(owner: str, part: object, base: type = object) -> None:
    """Refuses a part with only one of ``state_dict`` and ``load_state_dict``, or with ``load_state`` instead.

    Args:
        owner: name of the part, for messages.
        base: a base class whose own versions of these methods do not count.

    Raises:
        UserError: naming the missing method.
    """
    has = [
        name
        for name in STATE
        if hasattr(part, name) and getattr(type(part), name, part) is not getattr(base, name, None)
    ]
    if not has and callable(getattr(part, "load_state", None)):
        has = ["load_state"]
    if has and set(has) != set(STATE):
        missing = " and ".join(name for name in STATE if name not in has)
        raise UserError(
            f"{owner} has {has[0]} and no {missing}: its state would be lost at a resume; give it both of "
            f"{' and '.join(STATE)}"
        )


def refuse_state(owner: str, part: object) -> None:
    """Refuses state in a part whose state checkpoints do not hold.

    Raises:
        UserError: naming the method.
    """
    if kept := [name for name in (*STATE, "load_state") if hasattr(part, name)]:
        raise UserError(
            f"{owner} has {kept[0]}, but checkpoints hold no state of it, and a resume would lose it; keep the state "
            "in a reward or a callback"
        )
