"""Resuming from a checkpoint: finds it, checks that it fits the command, and rewinds the records to it.

Lightning loads it afterwards, when it validates or trains.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from policylab.runs.checkpoints import become_newest, checkpoint_iteration, checkpoint_state
from policylab.runs.find import checkpoint_to_resume
from policylab.runs.folder import write_atomically
from policylab.runs.metrics_file import read_rows, write_rows
from policylab.runs.same_run import (
    check_not_running,
    check_nothing_done,
    check_own_folder,
    check_same_values,
    check_something_left,
)
from policylab.runs.saved_config import load_config, plain, save_config
from policylab.runs.token_records import drop_records

log = logging.getLogger(__name__)


def find_start(config: DictConfig, run_folder: Path, resume: str) -> Path | None:
    """Finds the checkpoint to resume from; None if the run has saved none and starts from the beginning.

    Raises:
        UserError: when the checkpoint is damaged or of another run, or the run is still running or done.
    """
    checkpoint = checkpoint_to_resume(resume)
    check_not_running(run_folder)
    check_own_folder(run_folder, checkpoint, resume)
    before = load_config(run_folder)
    check_same_values(OmegaConf.to_container(before), plain(config))
    if checkpoint is None:
        check_nothing_done(run_folder, saves=OmegaConf.select(before, "callbacks.checkpoint") is not None)
        log.warning("%s has saved no state yet; it starts from the beginning", run_folder)
    else:
        check_something_left(config, run_folder, checkpoint)
    return checkpoint


def rewind_to(checkpoint: Path | None, config: DictConfig, run_folder: Path) -> None:
    """Cuts the records of a run to its checkpoint; None means the beginning.

    Call this after everything is built, because a refused command must not change the records.
    """
    if checkpoint:
        become_newest(run_folder, checkpoint)
    iteration = checkpoint_iteration(checkpoint) if checkpoint else 0
    rewind(run_folder, iteration, validates=validates_again(config, checkpoint))
    save_config(config, run_folder)


def validates_at(config: DictConfig, iteration: int) -> bool:
    """Whether ``validation.every`` asks for a validation after this iteration."""
    return bool(iteration % config.validation.every == 0)


def validates_again(config: DictConfig, checkpoint: Path | None) -> bool:
    """Whether a resumed run validates its first state: if a validation is due there, or nothing is left to train.

    If a finished run is extended, the validation at its earlier end stays in the records.
    """
    if checkpoint is None:
        return True
    state = checkpoint_state(checkpoint)
    spent = config.max_tokens is not None and state["tokens_sampled"] >= config.max_tokens
    return validates_at(config, state["iteration"]) or state["iteration"] >= config.iterations or spent


def rewind(run_folder: Path, iteration: int, *, validates: bool) -> None:
    """Drops what is after an iteration from ``metrics.csv``, ``samples.jsonl`` and ``rollouts/``; the resumed run
    writes it again.

    Args:
        validates: whether to drop the validation of that iteration as well. It comes after the checkpoint, and a kill
            may have come between its metrics and the update of the best checkpoint.
    """
    metrics, samples = run_folder / "metrics.csv", run_folder / "samples.jsonl"

    def stays(at: float, split: str) -> bool:
        return at < iteration or (at == iteration and not (validates and split == "val"))

    drop_records(run_folder, iteration)
    if metrics.is_file():
        rows = read_rows(metrics)
        cut = [{k: v for k, v in row.items() if stays(row["iteration"], k.split("/")[0])} for row in rows]
        write_rows(metrics, [row for row in cut if set(row) > {"iteration"}])
    if samples.is_file():
        lines = samples.read_text(encoding="utf-8").split("\n")  # splitlines() splits at more than \n
        kept = [line for line in lines if stays(*sample_origin(line))]
        write_atomically(samples, "".join(line + "\n" for line in kept))


def sample_origin(line: str) -> tuple[float, str]:
    """Iteration and split of a line of ``samples.jsonl``; infinity for a line that a crash has cut short."""
    try:
        sample = json.loads(line)
        return float(sample["iteration"]), str(sample["split"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf"), ""
