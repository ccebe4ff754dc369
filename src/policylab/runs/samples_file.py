"""``samples.jsonl``: completions with their rewards, a line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_samples(run_folder: Path) -> list[dict[str, Any]]:
    """The samples of a run in the order of writing, without a line that a crash has cut short; empty without any."""
    path = run_folder / "samples.jsonl"
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() splits at more than \n
    found = (parsed(line) for line in lines if line)
    return [sample for sample in found if sample is not None]


def parsed(line: str) -> dict[str, Any] | None:
    """One line; None where it is not whole."""
    try:
        sample = json.loads(line)
    except json.JSONDecodeError:
        return None
    whole = isinstance(sample, dict) and {"iteration", "split"} <= sample.keys()
    return sample if whole else None
