"""Checks that a command and a checkpoint continue the same run: its values, weights and data.

Each check raises `UserError`, which says what differs and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from policylab.errors import UserError, counted
from policylab.runs.checkpoints import LAST, PREVIOUS, checkpoint_state
from policylab.runs.damage import read
from policylab.runs.metrics_file import read_rows
from policylab.runs.places import PLACES
from policylab.runs.saved_config import ADDED
from policylab.runs.status import DONE, read_status, running_process
from policylab.runs.words import leaves

#: Keys that a resuming command may change: length, hardware and speed, callbacks and loggers, the optimizer's settings,
#: and paths of files (their contents are compared after they are read). Any other change would make it a different run.
MAY_CHANGE = (
    "iterations", "max_tokens", "resume", "plan", "plan_memory", "plan_flops", "name", "tags", "detect_anomaly",
    "hardware", "callbacks", "logger", "validation", "paths", "optim", *PLACES,
    "model.cache_dir", "model.attn_implementation", "model.trust_remote_code", "task.data_dir",
    "reward.workers", "reward.pool", "rollout.max_rows", "rollout.gpu_memory", "rollout.sleep", "rollout.context",
)  # fmt: skip
#: Exceptions to these: precision changes every number, all validations use the same prompts, and one metric decides
#: which checkpoint is best.
MAY_NOT_CHANGE = (
    "hardware.precision", "validation.prompts", "callbacks.checkpoint.monitor", "callbacks.checkpoint.mode",
)  # fmt: skip


def check_not_running(run_folder: Path) -> None:
    """Refuses a run that is still running: two processes would overwrite each other's records."""
    if (process := running_process(run_folder)) is not None:
        raise UserError(
            f"{run_folder} is still running, as process {process}; wait for its end, or stop it first"
        )


def check_own_folder(run_folder: Path, checkpoint: Path | None, resume: str) -> None:
    """Refuses a checkpoint from outside the run's folder."""
    if checkpoint is not None and not checkpoint.is_relative_to(run_folder.resolve()):
        raise UserError(f"resume={resume} continues in the folder of that run; leave out hydra.run.dir")


def check_same_values(before: Any, now: Any) -> None:
    """Refuses changed values that would make it a different run. A callback may be turned off.

    Args:
        before: the saved config of the run, as plain data.
        now: that of this command.
    """
    old, new = ADDED | dict(leaves(before)), ADDED | dict(leaves(now))
    other = [
        key
        for key in old | new
        if old.get(key) != new.get(key)
        and (not below(key, MAY_CHANGE) or (below(key, MAY_NOT_CHANGE) and key in new and key in old))
    ]
    if other:
        key = min(other, key=lambda key: not key.endswith("name"))
        more = f" (and {counted(len(other) - 1, 'more value')})" if len(other) > 1 else ""
        raise UserError(
            f"this run has {key}={old.get(key)}, the command says {new.get(key)}{more}; a resume may change "
            "iterations, max_tokens, hardware, optim, callbacks, logger and validation (docs/runs.md). For this change "
            "start a new run, from these weights with init=RUN in place of resume=RUN"
        )


def below(key: str, paths: Sequence[str]) -> bool:
    """Whether a dotted key is one of some, or lies below one."""
    return any(key == path or key.startswith((f"{path}.", f"{path}[")) for path in paths)


def check_something_left(config: DictConfig, run_folder: Path, checkpoint: Path) -> None:
    """Refuses a run that is done. One that was killed after its last iteration still has to validate and export."""
    state, finished = checkpoint_state(checkpoint), read_status(run_folder).get("status") == DONE
    done, sampled = state["iteration"], state["tokens_sampled"]
    if done > config.iterations or (finished and done == config.iterations):
        raise UserError(
            f"{run_folder} has done {counted(done, 'iteration')}, and iterations={config.iterations}; give "
            f"iterations=N above {done} to continue"
        )
    if finished and config.max_tokens is not None and sampled >= config.max_tokens:
        raise UserError(
            f"{run_folder} has sampled {sampled} of max_tokens={config.max_tokens} tokens; give max_tokens=N above "
            "that to continue"
        )


def check_nothing_done(run_folder: Path, *, saves: bool = True) -> None:
    """Refuses to restart a run whose checkpoints are lost, because its records would be lost as well.

    A run that was killed while it wrote its first checkpoint may restart; it has left the unfinished file.

    Args:
        saves: whether the run writes checkpoints; if not, it can only restart.
    """
    writing = (run_folder / "checkpoints" / f".{LAST}").exists()
    done = max((int(row["iteration"]) for row in read_rows(run_folder / "metrics.csv")), default=0)
    if read_status(run_folder).get("status") == DONE or (saves and done > 0 and not writing):
        raise UserError(
            f"{run_folder} has done {counted(done, 'iteration')}, but checkpoints/{LAST} and {PREVIOUS} are "
            "missing; put one of them back, name another file with resume=, or start a new run"
        )


def check_fits(
    module: Any,
    checkpoint: Path,
    advice: str = "give the model.* and optim.frozen_layers that the run was started with, or start a new run",
) -> None:
    """Refuses a checkpoint with other initial weights, other data, or another model than the one that was built.

    Args:
        module: the built module.
        advice: what to do, for the message.
    """
    content = read(checkpoint)
    module.run_state.check_origin(content["policylab"])
    given = module.given_weights()
    own = {name: shape_of(value) for name, value in module.state_dict().items() if name not in given}
    found = {name: shape_of(value) for name, value in content["state_dict"].items() if name not in given}
    if wrong := [name for name in own | found if own.get(name) != found.get(name)]:
        here, there = own.get(wrong[0], "missing"), found.get(wrong[0], "missing")
        raise UserError(
            f"{checkpoint} is of another model than this one: {wrong[0]} is {there} there and {here} here "
            f"({counted(len(wrong), 'weight')} in all); {advice}"
        )
    trained = [len(group["params"]) for group in module.configure_optimizers().param_groups]
    if (then := [len(g["params"]) for g in content["optimizer_states"][0]["param_groups"]]) != trained:
        raise UserError(f"{checkpoint} trained {sum(then)} weights, the command {sum(trained)}; {advice}")


def shape_of(value: Any) -> list[int]:
    """Shape of a weight; empty for anything else in a state."""
    return list(getattr(value, "shape", ()))
