"""Rows of text from a file or the hub, as examples, with their split."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from policylab.errors import UserError
from policylab.tasks.base import Example
from policylab.tasks.shuffle import permutation
from policylab.user_code import said

# Not the run's seed: runs with different seeds are compared on the same held-out rows.
HELD_OUT_KEY = 0
SPLITS = ("train", "val")
HUB_SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "val"}
FIELDS = ("prompt", "completion", "text", "reference", "split")

Columns = Mapping[str, str]  # field -> column


class Row(NamedTuple):
    """An example and where it belongs, if its source says so."""

    example: Example
    split: str | None


def read_jsonl(path: Path, prompt_words: int, columns: Columns) -> list[Row]:
    """The rows of a JSON-lines file, with the fields that ``docs/tasks_and_rewards.md`` lists.

    Args:
        columns: field -> what the file calls it, where that is something else.

    Raises:
        UserError: naming file and line, for a line that is no such row.
    """
    rows: list[Row] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except ValueError as error:  # no JSON, or no UTF-8
                raise UserError(f"{where}: {error}; give one JSON object a line") from None
            rows += _row(fields, where, prompt_words, columns)
    return rows


def read_hub(name: str, hub: Mapping[str, str | None], prompt_words: int, columns: Columns) -> list[Row]:
    """The rows of a data set from the hub or its local cache.

    Args:
        hub: its ``config`` and ``revision``, and the splits to take as ``train`` and ``val``; None takes what there is:
            the one config, the newest revision, the train split, and validation and test as held out.

    Raises:
        UserError: when ``datasets`` is not installed, or the data set or a split of it cannot be had.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"task.source={name} names a hub data set, which needs an extra: pip install -e '.[hub]' "
            f"(a local file ends in .jsonl)"
        ) from None
    from policylab.models.hub import why_unreachable

    offline = why_unreachable()
    if offline and "HF_HUB_OFFLINE" not in offline:
        raise UserError(
            f"task.source={name}: {offline}; HF_HUB_OFFLINE=1 uses a copy in the cache, "
            f"and task.source=default or a .jsonl file needs no network"
        )
    try:
        found = datasets.load_dataset(name, hub.get("config"), revision=hub.get("revision"))
    except Exception as error:  # many kinds, of which none is ours to repair
        chosen = "" if hub.get("config") else "; where it has several configs, name one: task.hub.config=..."
        raise UserError(
            f"task.source={name}: the data set cannot be loaded ({said(error)}){chosen}"
        ) from error
    rows: list[Row] = []
    for ours, split in _splits(name, hub, list(found)):
        for number, fields in enumerate(found[split]):
            rows += _row(fields | {"split": ours}, f"{name}/{split}:{number}", prompt_words, columns)
    return rows


def _splits(name: str, hub: Mapping[str, str | None], there: list[str]) -> list[tuple[str, str]]:
    """What a data set's splits are to us, and their own names."""
    chosen: list[tuple[str, str]] = []
    for ours in SPLITS:
        asked = hub.get(ours)
        if asked is not None and asked not in there:
            raise UserError(f"task.hub.{ours}={asked}: {name} has no such split; it has {', '.join(there)}")
        splits = [asked] if asked else [split for split in there if HUB_SPLITS.get(split) == ours]
        chosen += [(ours, split) for split in splits]
    if not chosen:
        raise UserError(
            f"task.source={name} has the splits {', '.join(there)}; say which to take: task.hub.train=..."
        )
    return chosen


def hold_out(rows: list[Row], count: int, source: str) -> tuple[list[Example], list[Example]]:
    """Training rows and held-out rows.

    Rows that name a split stay there. Where none is held out so, ``count`` rows are, drawn once and for all.

    Raises:
        UserError: when nothing would be left to train on.
    """
    train = [row.example for row in rows if row.split != "val"]
    val = [row.example for row in rows if row.split == "val"]
    if val:
        if not train:
            raise UserError(f"task.source={source} has no row to train on: all are held out (split: val)")
        return train, val
    if not 0 < count < len(train):
        raise UserError(
            f"task.held_out={count}, but task.source={source} has {len(train)} rows to share out; "
            f"hold out at least 1 and leave at least 1, or mark rows with split: val"
        )
    order = permutation(len(train), HELD_OUT_KEY)
    return [train[row] for row in order[count:]], [train[row] for row in order[:count]]


def _row(fields: Any, where: str, prompt_words: int, columns: Columns) -> Iterator[Row]:
    """The row that the fields describe; none for a text of one word, which cannot be cut in two."""
    if not isinstance(fields, dict):
        raise UserError(f"{where}: {fields!r:.60} is no object; give {{'prompt': ...}} or {{'text': ...}}")
    for field, column in columns.items():
        if column not in fields:
            raise UserError(
                f"{where}: task.columns.{field}={column} is not among the fields {sorted(fields)}"
            )
    fields = fields | {field: fields[column] for field, column in columns.items()}
    split, reference = fields.get("split"), fields.get("reference")
    if split not in (None, *SPLITS):
        raise UserError(f"{where}: split is {split!r}; it must be one of {', '.join(SPLITS)}")
    if "prompt" in fields:
        prompt = _text(fields, "prompt", where)
        completion = _text(fields, "completion", where) if fields.get("completion") else ""
        yield Row(Example(prompt, completion, reference, where), split)
    elif "text" in fields:
        words = _text(fields, "text", where).split()
        cut = min(prompt_words, len(words) - 1)
        if cut:
            yield Row(Example(" ".join(words[:cut]), " " + " ".join(words[cut:]), reference, where), split)
    else:
        raise UserError(
            f"{where}: neither prompt nor text among the fields {sorted(fields)}; say which is: task.columns.prompt=..."
        )


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} is {value!r:.60}; it must be a text that is not empty")
    return value
