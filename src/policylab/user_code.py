"""Calls code that is not ours; what it raises is told in one line, with its file and line."""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from policylab.data.text import Completion
from policylab.errors import RunError, UserError

T = TypeVar("T")

PACKAGE = str(Path(__file__).parent)
LIBRARIES = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})
#: Characters of a value, a text or an error that a message quotes.
QUOTED = 60
ERROR_QUOTED = 300


def call(what: str, function: Callable[..., T], *arguments: Any, among: Sequence[Completion] = ()) -> T:
    """What the user's function returns.

    Whatever it raises becomes a RunError: Lightning takes StopIteration for the end of the data, and ``sys.exit()``
    would end the run as if it were done.

    Args:
        what: how messages call the function, such as "reward brevity".
        among: completions, one of which the function may have been at when it failed.

    Raises:
        UserError, RunError: those that the function raises.
        RunError: for everything else that it raises, from that, so that ``train.log`` gets the traceback.
    """
    try:
        return function(*arguments)
    except (UserError, RunError):
        raise
    except (Exception, SystemExit, GeneratorExit) as error:
        raise RunError(f"{what} failed{place(error)}{completion_at(error, among)}: {said(error)}") from error


def place(error: BaseException) -> str:
    """`` at my_reward.py:7``: the innermost line outside of installed libraries and, if there is any, outside of this
    package; nothing for an error of a function that is not written in Python."""
    if isinstance(error, SyntaxError) and error.filename:
        return f" at {short(error.filename)}:{error.lineno}"
    # the first entry is the line that called
    lines = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)][1:]
    written = [entry for entry in lines if not entry[0].startswith((*LIBRARIES, "<"))]
    theirs = [entry for entry in written if not entry[0].startswith(PACKAGE)]
    found = theirs or written
    return f" at {short(found[-1][0])}:{found[-1][1]}" if found else ""


def is_theirs(error: BaseException) -> bool:
    """Whether a line of the user's own raised it, or called what raised it."""
    if isinstance(error, SyntaxError) and error.filename:
        files = [error.filename]
    else:
        files = [f.f_code.co_filename for f, _ in traceback.walk_tb(error.__traceback__)]
    return any(not file.startswith((*LIBRARIES, PACKAGE, "<")) for file in files)


def completion_at(error: BaseException, completions: Sequence[Completion]) -> str:
    """`` on the completion ' a film' of the prompt 'it is'``, where one of the functions that were running had a single
    completion in its variables; the innermost of them tells."""
    known = {id(completion): completion for completion in completions}
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        found = {id(value) for value in frame.f_locals.values()} & known.keys()
        if len(found) == 1:
            completion = known[found.pop()]
            return f" on the completion {shown(completion.text)} of the prompt {shown(completion.prompt)}"
    return ""


def said(error: BaseException) -> str:
    """Kind and message of an error on one line."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # a message that fails as well
        message = ""
    return cut(f"{type(error).__name__}: {message}" if message else type(error).__name__, ERROR_QUOTED)


def shown(value: Any) -> str:
    """Any value on one line, not too long."""
    try:
        return cut(" ".join(repr(value).split()), QUOTED)
    except Exception:  # such as a whole number of more than 4,300 digits
        return f"<{type(value).__name__}>"


def cut(text: str, limit: int) -> str:
    """The text, its end left out where it is longer.

    >>> cut("a long story", 10)
    'a long ...'
    """
    return text if len(text) <= limit else text[: limit - 3] + "..."


def short(file: str) -> str:
    """A file as one would name it in the current folder."""
    try:
        return str(Path(file).relative_to(Path.cwd()))
    except (ValueError, OSError):  # elsewhere, or the current folder is gone
        return file
