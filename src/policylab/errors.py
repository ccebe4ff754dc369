"""Errors that end a run, a check of bounds, and numbers with their nouns."""

from __future__ import annotations

import math
from collections.abc import Sequence


class UserError(Exception):
    """Bad input, described in one line: what is wrong, the value, what to do.

    The root scripts print the message without a traceback and exit with code 2.
    """


class ProcessFailed(Exception):
    """One of several processes failed; the message is its traceback."""


class RunError(Exception):
    """A run that cannot continue, described in one line: what happened, why, and what to do.

    The root scripts print the message without a traceback and exit with code 1; ``train.log`` has the traceback.
    """


def check_range(
    name: str, value: float | None, low: float, high: float = math.inf, *, above: bool = False
) -> None:
    """Refuses a number outside its bounds. None passes, for values that may be left out.

    Args:
        name: in the config.
        low, high: both allowed; with ``above``, ``low`` itself is not.

    Raises:
        UserError: naming the value and its bounds.
    """
    if value is None or (low < value <= high if above else low <= value <= high):
        return
    bounds = f"above {low:g}" if above else f"at least {low:g}"
    if high < math.inf:
        bounds += f" and at most {high:g}"
    raise UserError(f"{name} is {value}; it must be {bounds}")


def named(names: Sequence[str], most: int = 3) -> str:
    """The first few names, as text.

    >>> named(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def counted(number: int | str, noun: str) -> str:
    """A number with its noun, in the plural if needed.

    >>> counted(1, "iteration"), counted(20, "iteration"), counted(2, "minibatch")
    ('1 iteration', '20 iterations', '2 minibatches')
    """
    ending = "es" if noun.endswith(("tch", "s")) else "s"
    return f"{number} {noun}{ending * (str(number) != '1')}"
