"""Checks a config against the signatures of what it builds, before a model loads: unknown keys, missing keys, types."""

from __future__ import annotations

import inspect
import pydoc
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig

from policylab.config.suggest import nearest
from policylab.errors import RunError, UserError
from policylab.runs.saved_config import moved
from policylab.user_code import place, said

#: Keys that are for Hydra, not for the target.
HYDRA_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}


def check_signatures(config: DictConfig, path: str, ignore: frozenset[str]) -> None:
    """Checks every node below ``config`` that has a ``_target_``.

    Args:
        config: a node of the composed config.
        path: its dotted key, for messages; "" at the root.
        ignore: keys of this node, not of nodes below it, that are not passed to its target.

    Raises:
        UserError: for an unknown target, an unknown or missing key, or a value of the wrong type.
    """
    if "_target_" in config:
        _check_node(config, path, ignore)
    for key, value in config.items():
        if isinstance(value, DictConfig):
            check_signatures(value, f"{path}.{key!s}", frozenset())


def _check_node(config: DictConfig, path: str, ignore: frozenset[str]) -> None:
    target = target_of(config, path)
    parameters = inspect.signature(target).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    given = {str(k): v for k, v in config.items() if k not in HYDRA_KEYS | ignore}
    for key in given:
        if key not in parameters:
            # a partial gets its first argument when it is called
            keys = list(parameters)[1:] if config.get("_partial_") else list(parameters)
            near = nearest(f"{path}.{key}", [f"{path}.{name}" for name in keys]).strip()
            hint = near or (f"known are {', '.join(keys)}" if keys else "it has none")
            raise UserError(f"{path}.{key} is not a key of {target.__name__}; {hint}")
    required = [
        p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_POSITIONAL
    ]
    missing = [name for name in required if name not in given]
    # Only rewards are partials; `check_reward` checks how they can be called.
    if missing and not config.get("_partial_"):
        hint = f"; or, if {target.__name__} is the reward itself, give reward._partial_=true"
        its_own = path == "reward" and not inspect.isclass(target)
        raise UserError(
            f"{path}.{missing[0]} is missing; {target.__name__} needs it{hint if its_own else ''}"
        )
    hints = _hints(target)
    for key, value in given.items():
        if key in hints and not isinstance(value, DictConfig) and not _fits(value, hints[key]):
            raise UserError(f"{path}.{key}={value!r} is not {_words(hints[key])}")


def target_of(config: DictConfig, path: str) -> Callable[..., Any]:
    """The function or class that a node names.

    Raises:
        UserError: when it does not exist.
        RunError: when its module exists and cannot be imported.
    """
    name = config["_target_"]
    try:
        # unlike Hydra, distinguishes a missing module from one that imports a missing module
        target = pydoc.locate(name)
    except pydoc.ErrorDuringImport as failed:
        error = failed.value
        assert error is not None
        if not isinstance(error, Exception | SystemExit):
            raise error from None
        raise RunError(
            f"{path}._target_={name} cannot be imported: it failed{place(error)}: {said(error)}"
            f"{new_place(getattr(error, 'name', None))}"
        ) from error
    if callable(target):
        return target
    if target is not None:
        raise UserError(
            f"{path}._target_={name} is of type {type(target).__name__}; it must be a function or a class"
        )
    cannot = f"{path}._target_={name} cannot be imported:"
    module, _, attribute = name.rpartition(".")
    where = pydoc.locate(module) if module else None
    if where is None:
        hint = new_place(name) or f"; looked in {Path.cwd()} and in the installed packages"
        raise UserError(f"{cannot} there is no module {module or name}{hint}")
    near = nearest(name, [f"{module}.{known}" for known in dir(where)]).strip()
    hint = near or f"see {getattr(where, '__file__', module)}"
    raise UserError(f"{cannot} there is no {attribute} in {module}; {hint}")


def new_place(name: str | None) -> str:
    """``"; it is NEW now"`` for a module, or a name in one, that has moved; else empty."""
    new = moved(name or "")
    return f"; it is {new} now" if new and pydoc.locate(new) else ""


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    """Types by parameter; empty if they cannot be resolved at run time."""
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except NameError:
        return {}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a plain value has a plain type. Other types are left to the target."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if origin is Literal:
        return value in get_args(hint)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is str:
        return isinstance(value, str)
    if origin is tuple:
        return isinstance(value, ListConfig | list | tuple)
    return True


def _words(hint: Any) -> str:
    """A type in words, for messages."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(option) for option in get_args(hint))
    if origin is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    plain = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    return plain.get(hint, getattr(hint, "__name__", str(hint)))
