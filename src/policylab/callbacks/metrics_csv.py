"""The logger that every run has."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from policylab.callbacks.metrics_file import columns_of, format_row, read_rows, write_rows


class MetricsCSV(Logger):
    """Writes ``metrics.csv``: a row an iteration, in which training and validation metrics of it meet.

    Each row goes to the system at once, so that ``kill -9`` loses the current iteration at most. The file is
    written anew only when a metric appears for the first time.

    Args:
        run_dir: folder of the run. A file that is there is continued.
    """

    def __init__(self, run_dir: str) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._row: dict[str, float] = {}  # the last one, which may still grow
        self._row_start = 0  # its place in the file, in bytes
        self._opened = False

    @property
    def name(self) -> str:
        """What Lightning calls it."""
        return "csv"

    @property
    def version(self) -> str:
        """There is one a run."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the config stands in ``config.yaml``."""

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
        if set(self._row) <= set(self._columns):
            self._write_row()
        else:
            self._write_all(step)

    def _open(self) -> None:
        """Takes over the file of a run that is resumed."""
        if self._opened:
            return
        self._opened = True
        if rows := read_rows(self.path):
            write_rows(self.path, rows)  # without a last line that a crash cut short
            self._after_rewrite(rows)

    def _write_row(self) -> None:
        line = format_row(self._row, self._columns).encode()
        with self.path.open("r+b") as file:
            file.seek(self._row_start)
            file.write(line)
            file.truncate()

    def _write_all(self, step: int) -> None:
        rows = [row for row in read_rows(self.path) if row["iteration"] < step]
        rows.append(self._row)
        write_rows(self.path, rows)
        self._after_rewrite(rows)

    def _after_rewrite(self, rows: list[dict[str, float]]) -> None:
        self._columns = columns_of(rows)
        self._row = rows[-1]
        self._row_start = self.path.stat().st_size - len(format_row(self._row, self._columns).encode())
