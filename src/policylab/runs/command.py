"""The command line of a resumed run: the original one, overridden by the current one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from policylab.errors import UserError, counted
from policylab.runs.find import find_run, find_sweep
from policylab.runs.parents import INIT, check_same_parent, with_parent, with_parent_of_sweep
from policylab.runs.places import PLACES, texts_of_reward
from policylab.runs.redaction import HIDDEN
from policylab.runs.saved_config import load_config
from policylab.runs.status import DONE, read_status
from policylab.runs.words import MULTIRUN, last_value, override, override_key

#: ``resume=auto``: resume the run if it exists, else start it.
AUTO = "auto"


class NothingLeft(Exception):
    """``resume=auto`` has found a run that is done."""


def with_sweep(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command; in a multirun, ``sweep=SWEEP`` is replaced by the arguments that resume the sweep.

    Raises:
        UserError: when there is no such sweep, or with ``resume=``, which is for a single run.
    """
    if set(arguments).isdisjoint(MULTIRUN):
        return list(arguments)
    if any(word.startswith("resume=") for word in arguments):
        raise UserError(
            "resume= is for a single run; to resume a multirun, give sweep=PATH or sweep=latest with -m"
        )
    sweep, logs = last_value(arguments, "sweep"), last_value(arguments, "paths.logs")
    if sweep is None:
        return list(arguments)
    folder = find_sweep(sweep, Path(logs) if logs else None)
    rest = [word for word in arguments if not word.startswith(("sweep=", "hydra.sweep.dir="))]
    rest = with_parent_of_sweep(rest, folder)
    return [*rest, override("hydra.sweep.dir", folder), "hydra.launcher.resume=true"]


def with_command_of(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command; with ``resume=RUN``, added to those that started RUN, which they override.

    So ``train.py resume=latest iterations=200`` continues the same run up to iteration 200. ``init=RUN`` is replaced by
    the overrides that it stands for (`with_parent`).

    Raises:
        UserError: when RUN's arguments are not known completely.
    """
    resume, place = last_value(arguments, "resume"), last_value(arguments, "paths.logs")
    logs = Path(place) if place else None
    if resume == AUTO:
        arguments = resume_or_start(arguments)
        resume = last_value(arguments, "resume")
    if resume in (None, "", "null"):
        return with_parent(arguments, logs)
    if (parent := last_value(arguments, INIT)) is not None:
        raise UserError(
            f"init={parent} is for a new run, and resume={resume} resumes an existing one; give one of them"
        )
    folder = find_run(resume, logs)
    # Use the real path from now on, because `latest` may become a newer run.
    file = Path(resume).expanduser()
    place = override("resume", file.resolve() if file.is_file() else folder)
    arguments = [place if override_key(word) == "resume" else word for word in arguments]
    environment = folder / "env.json"
    if not environment.is_file():
        raise UserError(
            f"{folder} has no env.json, which holds the arguments that started it; start a new run, without resume"
        )
    given = {override_key(word) for word in arguments}
    recorded = json.loads(environment.read_text(encoding="utf-8"))["overrides"]
    found = absolute_places(load_config(folder))
    places = [f"++{override(key, path)}" for key, path in found if key not in given]
    replaced = given.union(map(override_key, places))
    # A choice of a group, such as reward=sentiment, replaces the whole group.
    chosen = (override_key(word) for word in arguments if not word.startswith("~"))
    groups = tuple(f"{key.replace('/', '.')}." for key in chosen)
    before = [
        word
        for word in recorded
        if (key := override_key(word)) not in replaced and not key.replace("/", ".").startswith(groups)
    ]
    if hidden := [override_key(word) for word in before if HIDDEN in word]:
        raise UserError(
            f"{hidden[0]} was given as plain text, and secrets are not saved; give it again with resume, best as "
            "'${oc.env:NAME}', which is saved"
        )
    return [*before, *places, *arguments]


def absolute_places(config: DictConfig) -> list[tuple[str, str]]:
    """The files and folders that a run reads, by key, from its saved config: relative paths and links of its command
    may mean something else now. Items of lists are left out, because a command line cannot name them."""
    found = [(key, OmegaConf.select(config, key)) for key in PLACES]
    found += [(key, text) for key, text in texts_of_reward(config) if "[" not in key]
    return [(key, place) for key, place in found if isinstance(place, str) and Path(place).is_absolute()]


def resume_or_start(arguments: Sequence[str]) -> list[str]:
    """Replaces ``resume=auto hydra.run.dir=DIR`` by ``resume=DIR`` if DIR holds a run, else drops ``resume=auto``.

    So the same job can be started any number of times.

    Raises:
        UserError: without a folder.
        NothingLeft: when the run there is done, and the command does not make it longer.
    """
    folder = last_value(arguments, "hydra.run.dir")
    if folder is None:
        raise UserError(f"resume={AUTO} needs hydra.run.dir=FOLDER: it resumes the run there, or starts it")
    rest = [word for word in arguments if word != f"resume={AUTO}"]
    run = Path(folder).expanduser()
    status = read_status(run)
    if not status:
        return rest
    check_same_parent(rest, run)
    rest = [word for word in rest if override_key(word) != INIT]
    lengths = {key: last_value(rest, key) for key in ("iterations", "max_tokens")}
    if status["status"] == DONE and all(v in (None, str(status.get(key))) for key, v in lengths.items()):
        raise NothingLeft(
            f"{folder} is done: {status['iteration']} of {counted(status['iterations'], 'iteration')}"
        )
    return [word for word in rest if not word.startswith("hydra.run.dir=")] + [override("resume", folder)]
