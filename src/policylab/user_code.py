"""Calls the user's code (rewards, tasks, environments): reports its exceptions in one line, and checks its results."""

from __future__ import annotations

import copy
import functools
import math
import signal
import sysconfig
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from policylab.data.text import Completion
from policylab.errors import RunError, UserError, counted

T = TypeVar("T")

PACKAGE = str(Path(__file__).parent)
#: The folder in which the command was started; paths are shown relative to it. A reward may change the current folder.
STARTED_IN = Path.cwd()
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
#: The largest number of single precision, in which rewards are kept.
LARGEST = 3.4028234663852886e38
#: Characters of a value, a text or an error that a message quotes.
QUOTED = 60
ERROR_QUOTED = 300


def call(what: str, function: Callable[..., T], *arguments: Any, among: Sequence[Completion] = ()) -> T:
    """Calls the user's function and returns its result.

    Any exception becomes a RunError: otherwise Lightning would take StopIteration for the end of the data and end the
    process without a message on KeyboardInterrupt, and ``sys.exit()`` would end the run as if it were done.

    Args:
        what: name of the function in messages, such as "reward brevity".
        among: completions; if the function fails on one of them, the message names it.

    Raises:
        UserError, RunError: those that the function raises.
        RunError: from any other exception of the function, so that ``train.log`` gets the traceback.
    """
    try:
        return function(*arguments)
    except (UserError, RunError):
        raise
    except (Exception, SystemExit, GeneratorExit, KeyboardInterrupt) as error:
        if isinstance(error, KeyboardInterrupt) and from_the_keyboard(error):
            raise
        raise RunError(f"{what} failed{place(error)}{completion_at(error, among)}: {said(error)}") from error


def from_the_keyboard(error: KeyboardInterrupt) -> bool:
    """Whether a signal handler raised it: Python's own, or that of a run, which raises a subclass."""
    return (
        type(error) is not KeyboardInterrupt or signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


def place(error: BaseException) -> str:
    """Where the error was raised, such as `` at my_reward.py:7``.

    It is the innermost line in the user's code, or else in this package; lines of installed libraries do not count.
    Empty if there is no such line, as in a function that is not written in Python.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {short_path(error.filename)}:{error.lineno}"
    # the first entry is the line that called
    lines = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)][1:]
    written = [entry for entry in lines if not entry[0].startswith((*LIBRARIES, "<"))]
    theirs = [entry for entry in written if not entry[0].startswith(PACKAGE)]
    found = theirs or written
    return f" at {short_path(found[-1][0])}:{found[-1][1]}" if found else ""


def failed_in_user_code(error: BaseException) -> str | None:
    """``Mine.training_step failed at mine.py:7: KeyError: 'x'``, where a line of user code raised the error, or
    called the library that did; None for an error of this package."""
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        code = frame.f_code
        if code.co_filename.startswith(PACKAGE):
            return None
        if not code.co_filename.startswith((*LIBRARIES, "<")):
            return f"{code.co_qualname} failed at {short_path(code.co_filename)}:{line}: {said(error)}"
    return None


def is_theirs(error: BaseException) -> bool:
    """Whether user code raised it, or called the code that raised it."""
    if isinstance(error, SyntaxError) and error.filename:
        files = [error.filename]
    else:
        files = [f.f_code.co_filename for f, _ in traceback.walk_tb(error.__traceback__)]
    return any(not file.startswith((*LIBRARIES, PACKAGE, "<")) for file in files)


def completion_at(error: BaseException, completions: Sequence[Completion]) -> str:
    """`` on the completion ' a film' of the prompt 'it is'``: the one in the local variables of the innermost function
    that has exactly one of these completions; empty if no function has."""
    known = {id(completion): completion for completion in completions}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        found = {id(value) for value in frame.f_locals.values()} & known.keys()
        if len(found) == 1:
            completion = known[found.pop()]
            return f" on the completion {shown(completion.text)} of the prompt {shown(completion.prompt)}"
    return ""


def said(error: BaseException) -> str:
    """Type and message of an error on one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # building the message fails as well
        message = ""
    return cut(f"{type(error).__name__}: {message}" if message else type(error).__name__, ERROR_QUOTED)


def shown(value: Any) -> str:
    """Any value on one line, shortened to ``QUOTED`` characters."""
    try:
        return cut(" ".join(repr(value).split()), QUOTED)
    except Exception:  # such as an integer of more than 4,300 digits
        return f"<{type(value).__name__}>"


def cut(text: str, limit: int) -> str:
    """The text, shortened to the limit if it is longer.

    >>> cut("a long story", 10)
    'a long ...'
    """
    return text if len(text) <= limit else text[: limit - 3] + "..."


def short_path(path: str | Path) -> str:
    """A path as typed in the folder in which the command was started: relative if it is below that folder."""
    try:
        return str((STARTED_IN / path).resolve().relative_to(STARTED_IN.resolve()))
    except ValueError:
        return str(path)


def handed_over(completions: Sequence[Completion]) -> tuple[Completion, ...]:
    """Copies of the completions, because the user's code may sort the sequence or change a reference.

    A reference that several completions share is copied once.

    Raises:
        RunError: when a reference cannot be copied.
    """
    references = call(
        "copying the references (they must be plain data)",
        copy.deepcopy,
        [completion.reference for completion in completions],
    )
    pairs = zip(completions, references, strict=True)
    return tuple(replace(completion, reference=reference) for completion, reference in pairs)


def check_names(owner: str, what: str, given: Any, *, nested: bool = False) -> None:
    """Refuses a value that is not a dict, or has a key that cannot be the name of a metric.

    Args:
        owner, what: names of the giver and of the value, for messages.
        nested: whether slashes may separate the parts of a name.

    Raises:
        UserError: naming the first such key.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{owner} gave {shown(given)} as {what}; it must be a dict from names to numbers")
    for name in given:
        if not isinstance(name, str) or not name.isprintable():
            raise UserError(
                f"{owner} gave {shown(name)} as a name in {what}; a name is a text without line breaks and other "
                "control characters"
            )
        if not all(name.split("/")) or (not nested and "/" in name):
            raise UserError(
                f"{owner} gave {shown(name)} as a name in {what}; a name is not empty and has no slash, which "
                "separates a part from its own parts"
            )


def one_for_each(owner: str, given: Any, expected: int) -> list[Any]:
    """The result of the user's code as a list.

    Args:
        owner: name of the code, for messages.
        expected: number of completions.

    Raises:
        UserError: when it is not an ordered sequence, or has another length.
        RunError: when reading it raises anything.
    """
    dimensions = getattr(given, "ndim", None)  # of an array of any library
    ordered = isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)
    if dimensions != 1 and (dimensions is not None or not ordered):
        what = f"an array of shape {tuple(given.shape)}" if dimensions is not None else shown(given)
        raise UserError(
            f"{owner} returned {what}; it must return a list of {counted(expected, 'score')}, one for each completion"
        )
    # tolist: one copy to the CPU for all numbers of an array
    answers = call(owner, given.tolist if hasattr(given, "tolist") else functools.partial(list, given))
    if len(answers) != expected:
        raise UserError(
            f"{owner} returned {counted(len(answers), 'score')} for {counted(expected, 'completion')}; "
            f"return one for each, in their order"
        )
    return answers


def finite(owner: str, what: str, values: Sequence[Any], completions: Sequence[Completion]) -> list[float]:
    """The values as floats.

    Args:
        owner, what: names of the giver and of the values, for messages.

    Raises:
        UserError: naming the completion whose value is not a finite number.
    """
    for index, value in enumerate(values):
        if not is_finite(value):
            raise UserError(
                f"{owner} gave {shown(value)} as the {what} of completion {index} "
                f"({shown(completions[index].text)}); it must be a finite number (of single precision)"
            )
    return [as_number(value) for value in values]


def is_finite(value: Any) -> bool:
    """Whether a value is a finite number, also in single precision."""
    return abs(as_number(value)) <= LARGEST


def as_number(value: Any) -> float:
    """A number of any library as a float; NaN for everything else."""
    # float() would accept "0.5" and an array of one number; from a reward, either is a mistake
    if isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", None):
        return math.nan
    try:
        return float(value)
    except Exception:  # whatever an object's __float__ raises; OverflowError for 10**400
        return math.nan
