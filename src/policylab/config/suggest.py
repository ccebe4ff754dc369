"""Suggestions for a name that does not exist."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

#: Smallest similarity of two names, from 0 to 1.
ALIKE = 0.7


def nearest(word: str, known: Iterable[str]) -> str:
    """``"did you mean X? "``; empty if no known key is similar.

    A similar key has the same last name; else it is in the same group, and its last name is an abbreviation, a longer
    form or another spelling. Hydra's own keys are never suggested.

    >>> nearest("optim.lrr", ["optim.lr", "seed"]), nearest("lr", ["optim.lr", "seed"])
    ('did you mean optim.lr? ', 'did you mean optim.lr? ')
    >>> nearest("optim.learning_rate", ["optim._target_", "optim.lr"]), nearest("reward.words", ["reward.workers"])
    ('did you mean optim.lr? ', '')
    """
    parent, _, name = word.rpartition(".")
    names = {key: key.rpartition(".")[2] for key in known}
    names = {key: last for key, last in names.items() if not last.startswith("_")}
    found = [key for key, last in names.items() if last == name]
    beside = {last: key for key, last in names.items() if key.rpartition(".")[0] == parent}
    found += [key for last, key in beside.items() if shortens(last, name) or shortens(name, last)]
    found += [beside[last] for last in difflib.get_close_matches(name, beside, n=1, cutoff=ALIKE)]
    return f"did you mean {found[0]}? " if found else ""


def shortens(short: str, long: str) -> bool:
    """Whether one name is the beginning of another one, or its initials.

    >>> shortens("eps", "epsilon"), shortens("lr", "learning_rate"), shortens("work", "words")
    (True, True, False)
    """
    return (len(short) > 2 and long.startswith(short)) or (
        "_" in long and short == "".join(part[:1] for part in long.split("_"))
    )
