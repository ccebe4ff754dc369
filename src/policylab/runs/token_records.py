"""``rollouts/``: training samples with the figures of each token; for each recorded iteration a file of compressed
JSON, a sample a line."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

FOLDER = "rollouts"
SUFFIX = ".jsonl.gz"


def write_records(run_folder: Path, iteration: int, records: Iterable[Mapping[str, Any]]) -> None:
    """Writes the samples of an iteration, atomically. The same samples give the same bytes.

    Raises:
        OSError: when there is no room.
    """
    path = run_folder / FOLDER / f"iteration_{iteration:06d}{SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    lines = "".join(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records)
    temporary = path.with_name(f".{path.name}")
    try:
        temporary.write_bytes(gzip.compress(lines.encode(), mtime=0))
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def recorded(run_folder: Path) -> dict[int, Path]:
    """The files of a run by iteration, in order."""
    files = (run_folder / FOLDER).glob(f"iteration_*{SUFFIX}")
    return dict(sorted((int(path.name.removesuffix(SUFFIX).rpartition("_")[2]), path) for path in files))


def read_records(path: Path) -> list[dict[str, Any]]:
    """The samples in one file."""
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        return [json.loads(line) for line in file]


def drop_records(run_folder: Path, after: int) -> None:
    """Deletes the files of later iterations: a resumed run writes them again."""
    for iteration, path in recorded(run_folder).items():
        if iteration > after:
            path.unlink()
