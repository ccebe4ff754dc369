"""The files of a run, and the differences between two runs, without times."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from policylab.errors import UserError
from policylab.runs.checkpoints import checkpoint_iteration, newest_whole_checkpoint
from policylab.runs.status import read_status

#: Entries of a checkpoint that are not compared, because they have no effect: the config, which has the folder, and
#: Lightning's count of validations, which counts the first one of a resumed run again.
ASIDE = ("policylab/config", "loops/validate_loop", "loops/fit_loop/epoch_loop.val_loop")
TIMES = ("wall_seconds",)
#: Number of differences reported for each file.
TOLD = 3


def differences(reference: Path, victim: Path) -> list[str]:
    """The differences between two run folders, except for times and folder names."""
    found = list[str]()
    for name, read in {
        "checkpoints/last.ckpt": checkpoint,
        "checkpoints/best.ckpt": checkpoint,
        "metrics.csv": metrics,
        "samples.jsonl": lines,
        "summary.json": summary,
        "status.json": status,
        "model/final": files,
        "model/best": files,
        "wandb": wandb_ids,
    }.items():
        found += [f"{name}: {text}" for text in unequal(read(reference / name), read(victim / name))]
    return found


def unequal(expected: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """The first few entries that differ, and how many more there are."""
    apart = [
        f"{name} is {short(found.get(name))}, not {short(expected.get(name))}"
        for name in dict.fromkeys([*expected, *found])
        if name not in found or name not in expected or not same(expected[name], found[name])
    ]
    more = len(apart) - TOLD
    return apart[:TOLD] + ([f"and {more} more"] if more > 0 else [])


def same(one: Any, other: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        alike = one.dtype == other.dtype and one.shape == other.shape
        return alike and torch.equal(bits(one), bits(other))
    return type(one) is type(other) and bool(one == other)


def bits(tensor: Tensor) -> Tensor:
    """A tensor's bytes: two NaN are equal, zeros of different signs are not."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def short(value: Any) -> str:
    """For a line of text."""
    if isinstance(value, Tensor):
        return f"a tensor with sum {value.double().sum():.17g}"
    return "missing" if value is None else str(value)[:100]


def checkpoint(path: Path) -> dict[str, Any]:
    """All values of a checkpoint that have an effect, by their path."""
    if not path.exists():
        return {}
    content = torch.load(path, map_location="cpu", weights_only=True)
    return {
        place: value
        for place, value in leaves(content)
        if not place.startswith(ASIDE) and "perf/" not in place
    }


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """The values in nested dicts and lists, with their paths."""
    if isinstance(value, dict | list | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from leaves(item, f"{place}/{key}" if place else str(key))
    else:
        yield place, value


def metrics(path: Path) -> dict[str, str]:
    """Every figure as it is written, by iteration and column; a second row of an iteration has another name."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    seen, figures = Counter[str](), dict[str, str]()
    for row in rows:
        seen[row["iteration"]] += 1
        again = f" (row {seen[row['iteration']]})" if seen[row["iteration"]] > 1 else ""
        for column, figure in row.items():
            if not column.startswith("perf/"):
                figures[f"iteration {row['iteration']}{again} {column}"] = figure
    return figures | {"order": " ".join(row["iteration"] for row in rows)}


def lines(path: Path) -> dict[str, str]:
    """A text file by line."""
    return {f"line {n}": line for n, line in enumerate(path.read_text().splitlines(), start=1)}


def summary(path: Path) -> dict[str, Any]:
    """A summary without times."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return {name: value for name, value in leaves(content) if name not in TIMES}


def status(path: Path) -> dict[str, Any]:
    """The progress in the run's status."""
    content = read_status(path.parent)
    return {name: content.get(name) for name in ("status", "iteration", "tokens_sampled", "exception")}


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of all files."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def wandb_ids(folder: Path) -> dict[str, int]:
    """The ids of W&B runs: each start creates a folder whose name ends in the run's id."""
    return {"runs": len({p.name.rpartition("-")[2] for p in folder.glob("*run-*-*")})}


def done(run: Path) -> int:
    """Number of iterations in the run's status."""
    return int(read_status(run).get("iteration", 0))


def kept(run: Path) -> int:
    """The iteration from which the run would resume."""
    try:
        found = newest_whole_checkpoint(run)
    except UserError:  # none of them can be read
        return 0
    return checkpoint_iteration(found) if found else 0


def whole(run: Path) -> bool:
    """Whether the rows of all iterations exist, in order; checked for the uninterrupted run."""
    with (run / "metrics.csv").open(newline="") as file:
        return [int(row["iteration"]) for row in csv.DictReader(file)] == list(range(done(run) + 1))
