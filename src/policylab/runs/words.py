"""Words of a command line, as a shell and Hydra's grammar want them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

#: Keys whose value is a path, taken as it stands whether or not there is anything.
PATHS = ("run", "resume", "checkpoint", "out", "hydra.run.dir", "hydra.sweep.dir", "paths.logs")
#: A home folder at the beginning of a value, or of an element of a list, where no shell replaces it.
HOME = re.compile(r"(?<=[=,\[])~(?=/)")
#: What `read` gives for a sweep, and where Hydra reads nothing.
UNREAD = object()


def quote(text: str) -> str:
    r"""Text in quotes, which Hydra reads as that text, brackets, commas and quotes included.

    >>> print(quote("it's [so] good"))
    "it's [so] good"
    """
    text = re.sub(r'(\\*)"', r'\1\1\\"', text)  # a quote, and the backslashes before it
    text = re.sub(r"(\\+)$", r"\1\1", text)  # backslashes before the closing quote
    return f'"{text}"'.replace("${", "\\${")


def override(key: str, value: object) -> str:
    """``key=value``, quoted where Hydra would not read the value as this text.

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
    """An override as one types it into a shell."""
    return shlex.quote(override(key, value))


def read(word: str) -> Any:
    """The value that Hydra reads in an override; ``UNREAD`` for a sweep, and where it reads none."""
    try:
        found = OverridesParser.create().parse_override(word)
        return UNREAD if found.is_sweep_override() else found.value()
    except HydraException:
        return UNREAD


def typed(word: str, free_text: Sequence[str] = ()) -> str:
    """A word that a person has typed, as Hydra's grammar wants it.

    The value of a free-text key is taken as it stands, and so is a path, unless it is in quotes already; ``~`` is the
    home directory.

    >>> typed("prompt=it's [so] good", ["prompt"])
    'prompt="it\'s [so] good"'
    >>> typed("run=a b=1,[c]"), typed("run='a b'"), typed("run=latest")
    ('run="a b=1,[c]"', "run='a b'", 'run=latest')
    """
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
