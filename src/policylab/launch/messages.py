"""One line for what is wrong with a command line or a config, with the nearest match where a name is unknown."""

from __future__ import annotations

import difflib
import errno
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policylab.errors import RunError, UserError

#: Of a disk that is full, or that nobody may write on: no fault of the program's.
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
UNKNOWN_KEY = re.compile(r"Could not override '(?P<key>[^']+)'")
UNKNOWN_CHOICE = re.compile(r"Could not (?:find|load) '(?P<group>[^']+)/(?P<choice>[^'/]+)'")
# The key alone, with its path in the next line; or, behind an interpolation, the path at once.
MISSING = re.compile(r"Missing mandatory value: (?:(\S+)\s+full_key: (?=\S+\.\1\b))?(?P<key>\S+)")
#: A variable of the environment that is not set, for one.
UNRESOLVED = re.compile(r"\w+ raised while resolving interpolation: (?P<why>.*)\s+full_key: (?P<key>\S+)")
SEARCHED = re.compile(r"path=file://(\S+)")
NOISE = ("full_key", "Error parsing override", "object_type", "See http", "reference_type")


def one_line(error: BaseException) -> str | None:
    """What is to be told of an error in place of its traceback; None for one that nobody has foreseen."""
    for cause in causes(error):
        if isinstance(cause, UserError | RunError | FloatingPointError):
            return str(cause)
    if isinstance(error, OSError) and no_room(error):
        what = error.filename or "a file of the run"
        return f"could not write {what}: {error.strerror}; make room, or take another folder"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {improve(str(error))}; write name=value, text with commas in quotes"
    if isinstance(error, InstantiationException):
        return None  # what a part raised while it was built is told with its traceback
    if isinstance(error, HydraException | OmegaConfBaseException):
        return improve(str(error))
    return None


def is_mistake(error: BaseException) -> bool:
    """Whether the input was wrong, rather than the run unlucky."""
    told = [cause for cause in causes(error) if isinstance(cause, UserError | RunError | FloatingPointError)]
    return isinstance(told[0], UserError) if told else not no_room(error)


def no_room(error: BaseException) -> bool:
    """Whether a disk is full, or nobody may write there."""
    return isinstance(error, OSError) and error.errno in NO_ROOM


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, what it was raised from, and so on."""
    current: BaseException | None = error
    seen = set[int]()  # an error may name itself as its cause
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def improve(message: str) -> str:
    """Hydra's message in one line, with a suggestion where one can be made."""
    if match := UNKNOWN_CHOICE.search(message):
        group, choice = match["group"], match["choice"]
        choices = sorted(
            {file.stem for root in SEARCHED.findall(message) for file in Path(root, group).glob("*.yaml")}
        )
        return f"{group}={choice} does not exist; {nearest(choice, choices)}choose from: {', '.join(choices)}"
    if match := UNKNOWN_KEY.search(message):
        key = match["key"].split("@")[0]
        return f"{key} is not in the config; {nearest(key, known_keys(key))}see what is with --cfg job"
    if match := MISSING.search(message):
        return f"{match['key']} must be given: {match['key']}=..."
    if match := UNRESOLVED.search(message):
        why = match["why"].strip('"')
        return f"{match['key']}: {why}"
    lines = [line.strip() for line in message.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(NOISE))


def nearest(word: str, known: Iterable[str]) -> str:
    """``"did you mean X? "`` for the most similar word, or nothing where none is similar.

    >>> nearest("optim.lrr", ["optim.lr", "seed"])
    'did you mean optim.lr? '
    >>> nearest("lr", ["optim.lr", "seed"])
    'did you mean optim.lr? '
    """
    known = list(known)
    found = [key for key in known if key.rsplit(".", 1)[-1] == word.rsplit(".", 1)[-1]]
    found = found or difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"did you mean {found[0]}? " if found else ""


def known_keys(unknown: str) -> list[str]:
    """Dotted keys of the config that this command line would give without the unknown key."""
    from hydra import compose, initialize_config_dir

    script = Path(sys.argv[0]).resolve()
    overrides = [
        word for word in sys.argv[1:] if re.match(r"[\w@/.]+=", word) and not word.startswith(unknown)
    ]
    try:
        with initialize_config_dir(str(script.parent / "configs"), version_base="1.3"):
            return list(dotted_keys(compose(script.stem, overrides)))
    except (HydraException, OmegaConfBaseException):
        return []  # something else is wrong too: no suggestion, and the first mistake is told


def dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """All keys of a config, groups before what they hold; nothing is resolved."""
    for key in map(str, config):
        yield f"{prefix}{key}"
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
            value = config[key]
            if isinstance(value, DictConfig):
                yield from dotted_keys(value, f"{prefix}{key}.")
