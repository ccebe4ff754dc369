"""Chains: a run that starts from the policy of another one, its parent (``init=RUN``)."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policylab.distributed.world import made_once
from policylab.errors import UserError
from policylab.runs.find import SWEEP_FILE, exported_iteration, find_policy, find_run
from policylab.runs.places import ASSETS
from policylab.runs.same_run import check_not_running
from policylab.runs.saved_config import load_config
from policylab.runs.status import DONE, FAILED, INTERRUPTED, read_status
from policylab.runs.words import MULTIRUN, last_value, override, override_key, word

INIT, RUN, WHICH = "init", "init.run", "init.which"
#: The policies that a run exports.
POLICIES = ("best", "final")
#: Keys that select weights, as ``init`` does.
WEIGHTS = ("model", "model.path", "model._target_")


def with_parent(arguments: Sequence[str], logs: Path | None) -> list[str]:
    """The arguments of a command, with ``init=RUN`` replaced by the overrides that load the policy of RUN.

    So ``algo=grpo init=latest`` becomes ``algo=grpo init.run=/FOLDER model=tiny model.path=/FOLDER/model/best
    model.name=tiny``, also for all jobs of a sweep, and for a later resume, when `latest` is another run. In a sweep
    over several parents, each name is resolved to a folder here; each job then replaces its own ``init=``.

    Args:
        logs: as for `find_run`.

    Raises:
        UserError: when there is no such run, or a run cannot start from it.
    """
    named = last_value(arguments, INIT)
    if named is None:
        return list(arguments)
    keys = {override_key(argument) for argument in arguments}
    if named in ("", "null"):
        words = []
    elif chosen := [argument for argument in arguments if override_key(argument) in WEIGHTS]:
        raise UserError(f"init={named} starts from the model of that run; leave out {chosen[0]}, or init")
    elif not keys.isdisjoint(MULTIRUN) and "," in named and not os.path.exists(named):
        runs = [override(INIT, find_run(name, logs)) for name in named.split(",")]
        words = [f"{INIT}={','.join(run.partition('=')[2] for run in runs)}"]
    else:
        find_run(named, logs)  # so that each process of a group raises the error
        run = Path(made_once("parent", lambda: str(find_run(named, logs))))
        words = [
            word for word in words_for(run, last_value(arguments, WHICH)) if override_key(word) not in keys
        ]
    place = next(i for i, argument in enumerate(arguments) if override_key(argument) == INIT)
    before, after = (
        [a for a in part if override_key(a) != INIT] for part in (arguments[:place], arguments[place:])
    )
    return [*before, *words, *after]


def with_parent_of_sweep(arguments: Sequence[str], sweep: Path) -> list[str]:
    """The arguments of a command that resumes a sweep: `latest` or a name after ``init=`` becomes the recorded parent,
    because it may now mean a newer run, such as a job of this sweep."""
    named = last_value(arguments, INIT)
    if named is None or os.path.exists(os.path.expanduser(named)):
        return list(arguments)
    first = (sweep / SWEEP_FILE).read_text(encoding="utf-8").partition("\n")
    parent = last_value(json.loads(first[0])["sweep"]["shared"], RUN) if first[1] else None
    if parent is None:
        return list(arguments)
    return [override(INIT, parent) if override_key(a) == INIT else a for a in arguments]


def words_for(run: Path, which: str | None) -> list[str]:
    """The overrides that load a policy of a run, with its label and its chat setting. For an embedded model they select
    that model, so that values tuned for it are used.

    Args:
        which: the command's ``init.which``; None if it has none.

    Raises:
        UserError: when the run has no such policy, or a run cannot start from it.
    """
    if which not in (None, *POLICIES):
        raise UserError(f"init.which={which} is not one of {', '.join(POLICIES)}")
    check_ended(run, which)
    model, policy = load_config(run).model, find_policy(run, which or POLICIES[0])
    words = [
        override(RUN, run),
        override("model", model.name if (ASSETS / str(model.name)).is_dir() else "hf"),
        override("model.path", policy),
        override("model.name", model.name),
        override("model.dtype", model.get("dtype", "float32")),
    ]
    chat = model.get("chat")
    return words if chat is None else [*words, f"model.chat={str(chat).lower()}"]


def check_ended(run: Path, which: str | None) -> None:
    """Refuses a run that is still running, because its policies change; and one that did not finish, unless the command
    names one of its policies."""
    check_not_running(run)
    status = read_status(run)
    if status["status"] == DONE or which is not None:
        return
    state = {FAILED: f"failed ({status.get('exception')})", INTERRUPTED: "was interrupted"}
    raise UserError(
        f"{run} {state.get(status['status'], 'was killed')} after iteration {status.get('iteration')} of "
        f"{status.get('iterations')}; finish it ({word('resume', run)}), or select the policy to start from: "
        f"init.which={'|'.join(POLICIES)}"
    )


def check_same_parent(arguments: Sequence[str], run: Path) -> None:
    """Refuses ``init=PATH`` if the run started from another one. Names and `latest` are accepted, because they may now
    mean a newer run."""
    named = last_value(arguments, INIT)
    if named is None or not (path := Path(named).expanduser()).exists():
        return
    parent = OmegaConf.select(load_config(run), RUN)
    if parent is None or find_run(path) != Path(parent):
        raise UserError(
            f"{run} started from {parent or 'no other run'}, and init={named}; give another hydra.run.dir"
        )


def ancestors(config: DictConfig, run_folder: Path, weights: str) -> list[dict[str, Any]]:
    """The ancestors of a run, the nearest first; none without ``init``. The record in the run's ``env.json`` is used if
    it exists, because the folders may have changed.

    Args:
        weights: fingerprint of the initial weights.
    """
    recorded = parents_of(run_folder)
    parent = OmegaConf.select(config, RUN)
    if recorded or parent is None:
        return recorded
    folder = Path(parent)
    nearest = {
        "run": parent,
        "name": OmegaConf.select(load_config(folder), "paths.run_name"),
        "policy": config.init.which,
        "iteration": exported_iteration(Path(config.model.path)),
        "weights": weights,
    }
    return [nearest, *parents_of(folder)]


def parents_of(run_folder: Path) -> list[dict[str, Any]]:
    """The ancestors of a run, from its ``env.json``."""
    file = run_folder / "env.json"
    return json.loads(file.read_text(encoding="utf-8")).get("parents", []) if file.is_file() else []


def lineage(parents: Sequence[dict[str, Any]]) -> str:
    """The ancestors of a run as text.

    >>> lineage([{"run": "/logs/a_s0", "name": "sft-tiny", "policy": "best", "iteration": 20}])
    'sft-tiny/a_s0 (best policy, of iteration 20)'
    """
    return ", which started from ".join(
        f"{parent['name']}/{Path(parent['run']).name} ({policy_in_words(parent['policy'], parent['iteration'])})"
        for parent in parents
    )


def policy_in_words(which: str, iteration: int | None) -> str:
    """The name of a policy, with its iteration if known."""
    return f"{which} policy" if iteration is None else f"{which} policy, of iteration {iteration}"
