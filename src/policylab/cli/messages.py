"""Errors in one line: what is wrong in a command line or a config, with the nearest match for an unknown name."""

from __future__ import annotations

import errno
import inspect
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from policylab.config.beside import BESIDE
from policylab.config.suggest import nearest
from policylab.errors import RunError, UserError
from policylab.runs.saved_config import unresolved
from policylab.user_code import failed_in_user_code

#: Optuna's message when no trial has succeeded.
NO_TRIAL = "No trials are completed yet."
#: Errors of a disk that is full or read-only.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
UNKNOWN_KEY = re.compile(r"Could not override '(?P<key>[^']+)'")
UNKNOWN_CHOICE = re.compile(r"Could not (?:find|load) '(?P<path>[^']+)'")
# The key alone, and its path in the next line; or, after an interpolation, the path directly.
MISSING = re.compile(r"Missing mandatory value: (?:(\S+)\s+full_key: (?=\S+\.\1\b))?(?P<key>\S+)")
#: A missing key that is read. Composed configs have all keys; saved configs of older runs may lack some.
OLDER = re.compile(r"Missing key \S+\s+full_key: (?P<key>\S+)")
SEARCHED = re.compile(r"path=file://(\S+)")
NOISE = ("full_key", "Error parsing override", "object_type", "See http", "reference_type")


def one_line(error: BaseException) -> str | None:
    """The message to print instead of a traceback; None for an unknown error of this package."""
    return known(error) or failed_in_user_code(error)


def known(error: BaseException) -> str | None:
    """The message of an error of a known kind."""
    for cause in causes(error):
        if isinstance(cause, UserError | RunError | FloatingPointError):
            return str(cause)
    if isinstance(error, OSError) and is_disk_error(error):
        what = error.filename or "a file of the run"
        return f"could not write {what}: {error.strerror}; make room, or take another folder"
    if NO_TRIAL in str(error):
        return "no trial of the search has succeeded; the status.json of each trial has the reason"
    if isinstance(error, OverrideParseException):
        return f"cannot read {error.override!r}: {improve(str(error))}; write name=value, text with commas in quotes"
    if isinstance(error, InstantiationException):
        return None  # a part raised it while it was built: print the traceback
    if isinstance(error, HydraException | OmegaConfBaseException):
        return improve(str(error))
    return None


def is_mistake(error: BaseException) -> bool:
    """Whether the input was wrong; False if something failed during the run."""
    told = [cause for cause in causes(error) if isinstance(cause, UserError | RunError | FloatingPointError)]
    return isinstance(told[0], UserError) if told else known(error) is not None and not is_disk_error(error)


def is_disk_error(error: BaseException) -> bool:
    """Whether a disk is full or read-only."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error, the one that it was raised from, and so on."""
    current: BaseException | None = error
    seen = set[int]()  # an error may be its own cause
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def improve(message: str) -> str:
    """Hydra's message in one line, with a suggestion if there is one."""
    if (match := UNKNOWN_CHOICE.search(message)) and (
        found := group_of(match["path"], SEARCHED.findall(message))
    ):
        group, choice, choices = found
        hint = instead(group, choice) or nearest(choice, choices)
        problem = f"{group}={choice} does not exist" if choice else f"{group}= has no value"
        return f"{problem}; {hint}choose from: {', '.join(choices)}"
    if match := UNKNOWN_KEY.search(message):
        key = match["key"].split("@")[0]
        if key == "sweep":
            return "sweep= resumes a multirun: give it with -m and the arguments of that multirun"
        config = config_without(key)
        hint = new_keyword(config, key) or nearest(key.replace("/", "."), dotted_keys(config))
        return f"{key} is not in the config; {hint}--cfg job prints all keys"
    if match := OLDER.search(message):
        key = match["key"]
        default = json.dumps(OmegaConf.select(config_without(key, "train"), key), default=str)
        return f"the run is older than {key}: add it to its config.yaml (a new run has {default} there)"
    if match := MISSING.search(message):
        return f"{match['key']} must be given: {match['key']}=..."
    if why := unresolved(message):
        return why
    lines = [line.strip() for line in message.splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(NOISE))


def group_of(path: str, roots: list[str]) -> tuple[str, str, list[str]] | None:
    """The config group of a choice that does not exist, that choice, and the existing ones; None without a group."""
    for end in sorted((match.start() for match in re.finditer("/", path)), reverse=True):
        group = path[:end]
        folders = [
            folder for root in roots if not group.endswith("/") and (folder := Path(root, group)).is_dir()
        ]
        if folders:
            return group, path[end + 1 :], sorted({file.stem for f in folders for file in f.glob("*.yaml")})
    return None


def instead(group: str, choice: str) -> str:
    """What to write instead of a choice that is a folder, a file, a class or a function."""
    if group == "model" and "/" in choice:
        folder = choice[0] in "/.~" or Path(choice).is_dir()
        keys = f"model.path={choice} model.name=NAME" if folder else f"model.name={choice}"
        return f"write model=hf {keys}; "
    if group == "task" and choice.endswith((".json", ".jsonl")):
        return f"write task.source={choice}; "
    return f"write {group}._target_={choice}; " if "." in choice and group in ("reward", "task") else ""


def new_keyword(config: DictConfig, key: str) -> str:
    """How to add a key that a group may leave out, or that the user's own class or function takes; else empty."""
    parent, _, name = key.replace("/", ".").rpartition(".")
    node = OmegaConf.select(config, parent) if parent else None
    if name in BESIDE.get(parent, ()):
        return f"the file of this {parent} leaves it out: write +{key}=...; "
    target = node.get("_target_") if isinstance(node, DictConfig) else None
    if target is None or target.startswith("policylab."):
        return ""
    try:
        parameters = inspect.signature(get_object(target)).parameters
    except Exception:  # it cannot be imported or has no signature: reported when it is built
        return ""
    return f"to give it to {target}, write +{key}=...; " if name in parameters else ""


def config_without(unknown: str, name: str = "") -> DictConfig:
    """The config of this command line without the unknown key.

    Args:
        name: a main config to take instead of the running script's; overrides are then ignored.
    """
    from hydra import compose, initialize_config_dir

    script = Path(sys.argv[0]).resolve()
    arguments = [] if name else sys.argv[1:]
    overrides = [word for word in arguments if re.match(r"[\w@/.]+=", word) and not word.startswith(unknown)]
    try:
        with initialize_config_dir(str(script.parent / "configs"), version_base="1.3"):
            return compose(name or script.stem, overrides)
    except (HydraException, OmegaConfBaseException):
        return OmegaConf.create()  # something else is wrong too: no suggestion


def dotted_keys(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a config, each group before its keys; interpolations are not resolved."""
    for key in map(str, config):
        yield f"{prefix}{key}"
        if not OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
            value = config[key]
            if isinstance(value, DictConfig):
                yield from dotted_keys(value, f"{prefix}{key}.")
