"""Arguments of a command line, quoted for a shell and for Hydra; and dotted keys of plain data."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

#: Keys whose value is a path, whether or not it exists.
PATHS = (
    *("run", "resume", "sweep", "init", "checkpoint", "out"),
    *("hydra.run.dir", "hydra.sweep.dir", "paths.logs"),
)
#: Hydra's flags of a multirun.
MULTIRUN = ("-m", "--multirun")
#: ``~`` at the start of a value or of a list's element; a shell does not expand it there.
HOME = re.compile(r"(?<=[=,\[])~(?=/)")
#: Result of `read` for a sweep, and for an argument that Hydra cannot read.
UNREAD = object()


def quote(text: str) -> str:
    r"""Text in quotes, so that Hydra reads exactly this text, with brackets, commas and quotes.

    >>> print(quote("it's [so] good"))
    "it's [so] good"
    """
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)  # a quote, and the backslashes before it
    text = re.sub(r"(\\+)$", r"\1\1", text)  # backslashes before the closing quote
    return f'"{text}"'.replace("${", "\\${")


def override(key: str, value: object) -> str:
    """``key=value``, quoted if Hydra would not read the value as this text.

    >>> override("run", "logs/a"), override("run", "a b=1,[c]"), override("run", "7")
    ('run=logs/a', 'run="a b=1,[c]"', 'run="7"')
    """
    text = str(value)
    plain = re.fullmatch(r"[\w./~+-]+", text) and read(f"{key}={text}") == text
    return f"{key}={text if plain else quote(text)}"


def command(script: str, *words: str) -> str:
    """A command for a shell: ``python evaluate.py run=logs/a``."""
    return shlex.join(["python", script, *words])


def word(key: str, value: object) -> str:
    """An override, quoted for a shell."""
    return shlex.quote(override(key, value))


def read(word: str) -> Any:
    """The value that Hydra reads in an override; ``UNREAD`` for a sweep, and if Hydra cannot read it."""
    try:
        found = OverridesParser.create().parse_override(word)
        return UNREAD if found.is_sweep_override() else found.value()
    except HydraException:
        return UNREAD


def last_value(words: Sequence[str], key: str) -> str | None:
    """The value that a command line gives a key; None when it gives none."""
    given = [word for word in words if word.startswith(f"{key}=")]
    if not given:
        return None
    value = read(given[-1])
    return value.replace("\\${", "${") if isinstance(value, str) else given[-1].partition("=")[2]


def typed(word: str, free_text: Sequence[str] = (), open_groups: Sequence[str] = ()) -> str:
    """An argument that a person has typed, quoted for Hydra.

    Quotes the value of a free-text key, and a path that is not in quotes yet; expands ``~``. Adds a key of an open
    group if the config does not have it.

    >>> typed("prompt=it's [so] good", ["prompt"])
    'prompt="it\'s [so] good"'
    >>> typed("run=a b=1,[c]"), typed("run='a b'"), typed("run=latest")
    ('run="a b=1,[c]"', "run='a b'", 'run=latest')
    >>> typed("task.source=vader", open_groups=["task"]), typed("task=reviews", open_groups=["task"])
    ('++task.source=vader', 'task=reviews')
    """
    if word.startswith(tuple(f"{group}." for group in open_groups)):
        return f"++{typed(word)}"
    if word == "debug=nan":
        return 'debug="nan"'  # the name of a preset, not the number
    key, equals, value = word.partition("=")
    if equals and key in free_text:
        return f"{key}={quote(value)}"
    path = os.path.expanduser(value)
    if ("/" in path and os.path.exists(path)) or (
        key in PATHS and not re.match(r"['\"]|null$|$", value) and "${" not in value
    ):
        return override(key, path)
    return HOME.sub(lambda _: str(Path.home()), word)


def override_key(word: str) -> str:
    """The key of an override: ``algo`` of ``algo=ppo``, ``optim.x`` of ``+optim.x=1``."""
    return word.split("=", 1)[0].lstrip("+~")


def leaves(item: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All single values of plain data with their dotted keys."""
    if isinstance(item, dict):
        for key, inner in item.items():
            yield from leaves(inner, f"{path}.{key}" if path else str(key))
    elif isinstance(item, list):
        for number, inner in enumerate(item):
            yield from leaves(inner, f"{path}[{number}]")
    else:
        yield path, item
