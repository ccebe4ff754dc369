"""Going on with a run: its command line, its checkpoint, its records."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policylab.errors import UserError
from policylab.runs.checkpoints import LAST, PREVIOUS, checkpoint_state
from policylab.runs.find import find_run
from policylab.runs.folder import write_atomically
from policylab.runs.metrics_file import read_rows, write_rows
from policylab.runs.places import PLACES, keys_of_reward
from policylab.runs.redaction import HIDDEN
from policylab.runs.saved_config import leaves, load_config, plain
from policylab.runs.status import DONE, read_status, running_process
from policylab.runs.words import override, read

log = logging.getLogger(__name__)

#: ``resume=auto``: go on if there is something to go on with.
AUTO = "auto"
#: What may differ from the command that started the run: how long it is, where and how fast it runs, what watches it,
#: the optimizer's settings, and the places of files (their contents are compared once they are read). All else would
#: make another run of it.
MAY_CHANGE = (
    "iterations", "max_tokens", "resume", "plan", "plan_memory", "plan_flops", "name", "tags", "detect_anomaly",
    "hardware", "callbacks", "logger", "validation", "paths", "optim", *PLACES,
    "model.cache_dir", "model.attn_implementation", "model.trust_remote_code", "task.data_dir",
    "reward.workers", "reward.pool", "rollout.max_rows", "rollout.gpu_memory", "rollout.sleep", "rollout.context",
)  # fmt: skip
#: Below these, what may not: the precision is part of every number, and before and after are of the same prompts.
MAY_NOT_CHANGE = ("hardware.precision", "validation.prompts")


class NothingLeft(Exception):
    """``resume=auto`` has found a run that is done."""


def with_command_of(arguments: Sequence[str]) -> list[str]:
    """The arguments of a command; with ``resume=RUN`` among them, on top of those that RUN was started with.

    So ``train.py resume=latest iterations=200`` means: the same run, but up to iteration 200.

    Raises:
        UserError: when it is not known, or not in full, what RUN was started with.
    """
    resume, logs = last_value(arguments, "resume"), last_value(arguments, "paths.logs")
    if resume == AUTO:
        arguments = go_on_or_start(arguments)
        resume = last_value(arguments, "resume")
    if resume in (None, "", "null"):
        return list(arguments)
    folder = find_run(resume, Path(logs) if logs else None)
    # From here on the run has a name of its own, so that a newer one cannot slip in behind a link.
    file = Path(resume).expanduser()
    place = override("resume", file.resolve() if file.is_file() else folder)
    arguments = [place if override_key(word) == "resume" else word for word in arguments]
    environment = folder / "env.json"
    if not environment.is_file():
        raise UserError(
            f"{folder} has no env.json, which says what it was started with; start a new run, without resume"
        )
    given = {override_key(word) for word in arguments}
    recorded = json.loads(environment.read_text(encoding="utf-8"))["overrides"]
    found = absolute_places(load_config(folder))
    places = [f"++{override(key, path)}" for key, path in found if key not in given]
    told = given.union(map(override_key, places))
    before = [word for word in recorded if override_key(word) not in told]
    if hidden := [override_key(word) for word in before if HIDDEN in word]:
        raise UserError(
            f"{hidden[0]} was given in clear and is not kept; give it again beside resume, best as "
            "'${oc.env:NAME}', which is kept"
        )
    return [*before, *places, *arguments]


def absolute_places(config: DictConfig) -> list[tuple[str, str]]:
    """The files and folders that a run reads, by key, as `placed` has settled them: what its command says of them may
    mean something else by now."""
    found = ((key, OmegaConf.select(config, key)) for key in (*PLACES, *keys_of_reward(config)))
    return [(key, place) for key, place in found if isinstance(place, str) and Path(place).is_absolute()]


def go_on_or_start(arguments: Sequence[str]) -> list[str]:
    """``resume=auto hydra.run.dir=DIR`` made plain: so a job can be submitted once, and started as often as need be.

    Raises:
        UserError: without a folder.
        NothingLeft: when the run there is done, and the command asks for no more of it.
    """
    folder = last_value(arguments, "hydra.run.dir")
    if folder is None:
        raise UserError(
            f"resume={AUTO} needs hydra.run.dir=FOLDER: it goes on with the run there, or starts it"
        )
    rest = [word for word in arguments if word != f"resume={AUTO}"]
    status = read_status(Path(folder).expanduser())
    if not status:
        return rest
    lengths = {key: last_value(rest, key) for key in ("iterations", "max_tokens")}
    if status["status"] == DONE and all(v in (None, str(status.get(key))) for key, v in lengths.items()):
        raise NothingLeft(f"{folder} is done: {status['iteration']} of {status['iterations']} iterations")
    return [word for word in rest if not word.startswith("hydra.run.dir=")] + [override("resume", folder)]


def last_value(arguments: Sequence[str], key: str) -> str | None:
    """The value that a command line gives a key; None when it gives none."""
    words = [word for word in arguments if word.startswith(f"{key}=")]
    if not words:
        return None
    value = read(words[-1])
    return value.replace("\\${", "${") if isinstance(value, str) else words[-1].partition("=")[2]


def override_key(word: str) -> str:
    """What an override is about: ``algo`` of ``algo=ppo``, ``optim.x`` of ``+optim.x=1``."""
    return word.split("=", 1)[0].lstrip("+~")


def check_same_run(config: DictConfig, run_folder: Path, checkpoint: Path | None) -> None:
    """Refuses to go on with a run as if it were another one.

    Args:
        checkpoint: to go on from; None for the start.

    Raises:
        UserError: when the folder or a value that may not change differs, nothing is left to do, or the run is still
            running: two processes would spoil each other's records. A run that was killed after its last iteration
            has a validation, a summary and its model left to write.
    """
    if (process := running_process(run_folder)) is not None:
        raise UserError(
            f"{run_folder} is still running, as process {process}; wait for its end, or stop it first"
        )
    if checkpoint is not None and not checkpoint.is_relative_to(run_folder.resolve()):
        raise UserError(f"resume={config.resume} goes on in the folder of that run; leave out hydra.run.dir")
    demand_same_values(OmegaConf.to_container(load_config(run_folder)), plain(config))
    if checkpoint is None:
        demand_nothing_done(run_folder)
        log.warning("%s has saved no state yet; it starts from the beginning", run_folder)
        return
    state, finished = checkpoint_state(checkpoint), read_status(run_folder).get("status") == DONE
    done, sampled = state["iteration"], state["tokens_sampled"]
    if done > config.iterations or (finished and done == config.iterations):
        raise UserError(
            f"{run_folder} has done {done} iterations, and iterations={config.iterations}; give iterations=N above "
            f"{done} to go on"
        )
    if finished and config.max_tokens is not None and sampled >= config.max_tokens:
        raise UserError(
            f"{run_folder} has sampled {sampled} of max_tokens={config.max_tokens} tokens; give max_tokens=N above "
            "that to go on"
        )


def demand_same_values(before: Any, now: Any) -> None:
    """Refuses values that make another run of it.

    Args:
        before: the config that the run has on record, as `plain` gives it; ``now``: that of this command.

    Raises:
        UserError: naming the first such value, names before what they stand for, and how many more there are.
    """
    old, new = dict(leaves(before)), dict(leaves(now))
    other = [
        key
        for key in old | new
        if old.get(key) != new.get(key) and (not below(key, MAY_CHANGE) or below(key, MAY_NOT_CHANGE))
    ]
    if other:
        key = min(other, key=lambda key: not key.endswith("name"))
        more = f" ({len(other) - 1} more values differ)" if len(other) > 1 else ""
        raise UserError(
            f"this run has {key}={old.get(key)}, the command says {new.get(key)}{more}; start a new run, without resume"
        )


def below(key: str, paths: Sequence[str]) -> bool:
    """Whether a dotted key is one of some, or lies below one."""
    return any(key == path or key.startswith((f"{path}.", f"{path}[")) for path in paths)


def demand_nothing_done(run_folder: Path) -> None:
    """Refuses to start a run over whose states are lost: its records would be lost as well.

    A run that was killed while it wrote its first state has left what it had written of it.

    Raises:
        UserError: saying how far it was.
    """
    writing = (run_folder / "checkpoints" / f".{LAST}").exists()
    done = max((int(row["iteration"]) for row in read_rows(run_folder / "metrics.csv")), default=0)
    if read_status(run_folder).get("status") == DONE or (done > 0 and not writing):
        raise UserError(
            f"{run_folder} has done {done} iterations, but checkpoints/{LAST} and {PREVIOUS} are missing; put one of "
            "them back, name another file with resume=, or start a new run"
        )


def rewind(run_folder: Path, iteration: int, *, validates: bool) -> None:
    """Drops from the records what came after the state of an iteration; the resumed run writes it again.

    Args:
        validates: whether to drop the validation of that iteration, which comes after its state. It is done again,
            since the run may have been killed between its metrics and what follows from them.
    """
    metrics, samples = run_folder / "metrics.csv", run_folder / "samples.jsonl"

    def stays(at: float, split: str) -> bool:
        return at < iteration or (at == iteration and not (validates and split == "val"))

    if metrics.is_file():
        rows = read_rows(metrics)
        cut = [{k: v for k, v in row.items() if stays(row["iteration"], k.split("/")[0])} for row in rows]
        write_rows(metrics, [row for row in cut if set(row) > {"iteration"}])
    if samples.is_file():
        lines = samples.read_text(encoding="utf-8").split("\n")  # splitlines() knows more ends
        kept = [line for line in lines if stays(*sample_origin(line))]
        write_atomically(samples, "".join(line + "\n" for line in kept))


def sample_origin(line: str) -> tuple[float, str]:
    """Iteration and split of a line of ``samples.jsonl``; a line cut short by a crash is of no iteration."""
    try:
        sample = json.loads(line)
        return float(sample["iteration"]), str(sample["split"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf"), ""
