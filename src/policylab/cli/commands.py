"""The arguments of ``runs.py``, which has commands: ``compare A B``."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import takewhile

from policylab.runs.words import override, quote

#: Names of runs to list. They are not groups here, so they are below `only` in the config.
FILTERS = ("task", "algo", "model", "state")


def as_overrides(words: Sequence[str]) -> list[str]:
    """The arguments of ``runs.py`` as overrides of its config. The first word without ``=`` is the
    command, those after it are runs.

    >>> as_overrides(["compare", "latest", "logs/a b"])
    ['command=compare', 'runs=["latest","logs/a b"]']
    >>> as_overrides(["algo=ppo,rloo", "sort=reward"])
    ['only.algo="ppo,rloo"', 'sort=reward']
    """
    before_flags = takewhile(lambda word: not word.startswith("-"), words)
    bare = [word for word in before_flags if "=" not in word or os.path.exists(word)]
    found = [_filter(word) for word in words if word not in bare]
    if bare[1:]:
        found.insert(0, f"runs=[{','.join(map(quote, bare[1:]))}]")
    return [override("command", word) for word in bare[:1]] + found


def _filter(word: str) -> str:
    key, equals, value = word.partition("=")
    return override(f"only.{key}", value) if equals and key in FILTERS else word
