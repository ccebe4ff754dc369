"""``summary.json``: the results of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from policylab.runs.folder import write_json
from policylab.runs.metrics_file import Row, best_row, read_rows, validated


def summarize(config: DictConfig, run_folder: Path, outcome: dict[str, Any]) -> dict[str, Any]:
    """The summary. It is made from ``metrics.csv``, so it covers all sessions of a resumed run.

    Args:
        outcome: status, iterations, seconds and tokens, which are not in ``metrics.csv``.
    """
    rows = validated(read_rows(run_folder / "metrics.csv"))
    monitor, mode = objective(config)
    best = best_row(rows, monitor, mode) if monitor else None
    return {
        "before": validation_metrics(rows[0]) if rows else {},
        "after": validation_metrics(rows[-1]) if rows else {},
        "best": {"metric": monitor, "value": best[monitor], "iteration": int(best["iteration"])}
        if monitor and best
        else None,
        **outcome,
    }


def objective(config: DictConfig) -> tuple[str | None, str]:
    """The metric that decides which checkpoint is best, and its mode, "max" or "min"."""
    checkpoint = OmegaConf.select(config, "callbacks.checkpoint")
    return (checkpoint.monitor, checkpoint.mode) if checkpoint else (None, "max")


def validation_metrics(row: Row) -> dict[str, float]:
    """The ``val/...`` part of a row, with its iteration."""
    return {name: value for name, value in row.items() if name == "iteration" or name.startswith("val/")}


def write_summary(run_folder: Path, summary: dict[str, Any]) -> None:
    """Writes ``summary.json``, atomically."""
    write_json(run_folder / "summary.json", summary)
