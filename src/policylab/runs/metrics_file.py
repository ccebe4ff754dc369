"""``metrics.csv``: one row per iteration, one column per metric; a missing value is an empty cell."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path

from policylab.runs.folder import write_atomically

Row = Mapping[str, float]
#: Bytes at the end of a file that `read_tail` reads.
TAIL = 2**15


def read_rows(path: Path) -> list[dict[str, float]]:
    """All whole rows, without empty values and without a row that a crash has cut short."""
    if not path.is_file():
        return []
    return _parsed(path.read_text(encoding="utf-8"))


def read_tail(path: Path) -> list[dict[str, float]]:
    """The last rows: quick, however long the file is."""
    with path.open("rb") as file:
        header = file.readline()
        file.seek(max(len(header), path.stat().st_size - TAIL))
        cut = file.tell() > len(header)  # the first line is not whole
        lines = file.read().split(b"\n")[cut:]
    return _parsed((header + b"\n".join(lines)).decode())


def _parsed(text: str) -> list[dict[str, float]]:
    whole = text[: text.rfind("\n") + 1]
    rows = []
    for row in csv.DictReader(io.StringIO(whole)):
        if None in row or None in row.values():
            continue
        rows.append({name: float(value) for name, value in row.items() if value != ""})
    return [row for row in rows if "iteration" in row]


def curves_of(rows: Iterable[Row]) -> dict[str, dict[int, float]]:
    """The values of each column by iteration, in order. An empty cell (no validation at that iteration) gives none."""
    curves: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["iteration"]):
        for name, value in row.items():
            if name != "iteration":
                curves.setdefault(name, {})[int(row["iteration"])] = value
    return curves


def columns_of(rows: Iterable[Row]) -> list[str]:
    """Names in order of appearance, ``iteration`` first."""
    return list(dict.fromkeys(["iteration", *(name for row in rows for name in row)]))


def format_row(row: Row, columns: Iterable[str]) -> str:
    """One line. Numbers are written in full: reading gives the same bits."""
    return _line(_number(row[name]) if name in row else "" for name in columns)


def write_rows(path: Path, rows: list[dict[str, float]]) -> None:
    """Replaces the file, atomically."""
    columns = columns_of(rows)
    write_atomically(path, _line(columns) + "".join(format_row(row, columns) for row in rows))


def _line(cells: Iterable[str]) -> str:
    """Cells as one line; names may hold commas and quotes."""
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(cells)
    return line.getvalue()


def validated(rows: Iterable[Row]) -> list[Row]:
    """Rows of iterations that were validated."""
    return [row for row in rows if any(name.startswith("val/") for name in row)]


def is_validated(path: Path, iteration: int) -> bool:
    """Whether the file has the metrics of a validation at this iteration."""
    return any(row["iteration"] == iteration for row in validated(read_rows(path)))


def best_row(rows: Iterable[Row], monitor: str, mode: str) -> Row | None:
    """The row with the best value of a metric, the first one among equals; None when no row has it. Leaves out the
    validation before training.

    Args:
        mode: "max" or "min".
    """
    having = [row for row in rows if row["iteration"] > 0 and row.get(monitor, math.nan) == row.get(monitor)]
    if not having:
        return None
    return (max if mode == "max" else min)(having, key=lambda row: row[monitor])


def _number(value: float) -> str:
    value = float(value)
    return str(int(value)) if value.is_integer() and abs(value) < 2**53 else repr(value)
