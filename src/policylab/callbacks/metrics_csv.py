"""The logger that every run has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from policylab.errors import RunError, counted
from policylab.runs.metrics_file import columns_of, format_row, read_rows, write_rows
from policylab.runs.retry import RetryLater, retry_while_full


class MetricsCSV(Logger):
    """Writes ``metrics.csv``: one row for each iteration, with its training and validation metrics.

    Each row is written at once, so that ``kill -9`` loses at most the current iteration. The whole file is rewritten
    only when a metric appears for the first time, and when earlier rows could not be written.

    Args:
        run_dir: folder of the run. An existing file is continued.

    Attributes:
        unwritten: rows that are not in the file yet.
    """

    def __init__(self, run_dir: str) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self.unwritten: list[dict[str, float]] = []
        self.retry_later = RetryLater(
            self.path, "its rows are kept in memory and in checkpoints until it can be written"
        )
        self._columns: list[str] = []  # of the file; empty before it is written
        self._row: dict[str, float] = {}  # the last one, to which metrics may be added
        self._row_start = 0  # its offset in the file, in bytes
        self._opened = False

    @property
    def name(self) -> str:
        """Its name in Lightning."""
        return "csv"

    @property
    def version(self) -> str:
        """None: a run has one file."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Does nothing: the config is in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Adds metrics to the row of an iteration.

        Args:
            step: the iteration; never below that of the last call.
        """
        if step is None:
            raise ValueError("metrics need their iteration as step")
        self._open()
        values = {name: float(value) for name, value in metrics.items()}
        if self._row.get("iteration") == step:
            self._row |= values
        else:
            self._row = {"iteration": step, **values}
            self._row_start = self.path.stat().st_size if self.path.exists() else 0
        self._save()

    def rows(self) -> list[dict[str, float]]:
        """All rows, with those that are not in the file yet."""
        first = self.unwritten[0]["iteration"] if self.unwritten else float("inf")
        return [row for row in read_rows(self.path) if row["iteration"] < first] + self.unwritten

    def restore(self, unwritten: list[dict[str, float]]) -> None:
        """Adds the rows in a checkpoint that could not be written to the file before."""
        self._open()
        known = {row["iteration"] for row in self.rows()}
        if missing := [row for row in unwritten if row["iteration"] not in known]:
            self.unwritten += missing
            self._row = missing[-1]
            self._save()

    def settle(self) -> None:
        """Writes the waiting rows; on a full disk, waits for room."""
        if self.unwritten:
            with self.retry_later:
                retry_while_full(self._write_all)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Tries once more; rows that still cannot be written are an error."""
        self.settle()
        if self.unwritten and status == "success":
            raise RunError(
                f"could not write {self.path}: {counted(len(self.unwritten), 'row')} missing; make room (or the file "
                "writable), then continue with resume=RUN"
            )

    def _open(self) -> None:
        """Continues the file of a resumed run. It is rewritten, without a line that a crash left incomplete."""
        if not self._opened:
            self._opened = True
            self._row = (read_rows(self.path) or [{}])[-1]

    def _save(self) -> None:
        with self.retry_later:
            if self.unwritten or not set(self._row) <= set(self._columns):
                self._write_all()
            else:
                self._write_row()
        if self.retry_later.failing and self._row not in self.unwritten[-1:]:
            self.unwritten.append(self._row)

    def _write_row(self) -> None:
        line = format_row(self._row, self._columns).encode()
        with self.path.open("r+b") as file:
            file.seek(self._row_start)
            file.write(line)
            file.truncate()

    def _write_all(self) -> None:
        rows = [row for row in self.rows() if row["iteration"] < self._row["iteration"]]
        rows.append(self._row)
        write_rows(self.path, rows)
        self.unwritten = []
        self._columns = columns_of(rows)
        self._row_start = self.path.stat().st_size - len(format_row(self._row, self._columns).encode())
