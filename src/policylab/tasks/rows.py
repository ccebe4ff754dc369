"""Rows of text from a file or the hub, as examples, with their split."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from policylab.errors import UserError, counted
from policylab.tasks.base import Example
from policylab.tasks.shuffle import permutation
from policylab.user_code import said

log = logging.getLogger(__name__)

# Not the run's seed, so that runs with different seeds are compared on the same held-out rows.
HELD_OUT_KEY = 0
SPLITS = ("train", "val")
HUB_SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "val"}
FIELDS = ("prompt", "completion", "text", "reference", "split")

Columns = Mapping[str, str]  # field -> column


class Row(NamedTuple):
    """An example, and its split if the source gives one."""

    example: Example
    split: str | None


def read_jsonl(path: Path, prompt_words: int, columns: Columns) -> list[Row]:
    """The rows of a JSON-lines file, with the fields that ``docs/tasks_and_rewards.md`` lists.

    Args:
        columns: field -> its name in the file, if that differs.

    Raises:
        UserError: naming file and line, for a line that is not such a row.
    """
    read: list[Row | None] = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: {error.msg} at column {error.colno}; give one JSON object a line"
                ) from None
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: {error}; save the file as UTF-8") from None
            read.append(_row(fields, where, prompt_words, columns))
    return _told(read, str(path))


def read_hub(name: str, hub: Mapping[str, str | None], prompt_words: int, columns: Columns) -> list[Row]:
    """The rows of a data set from the hub or its local cache.

    Args:
        hub: its ``config`` and ``revision``, and the splits to use as ``train`` and ``val``. None: the only config,
            the newest revision, the train split, and validation and test as held-out rows.

    Raises:
        UserError: when ``datasets`` is not installed, or the data set or a split of it cannot be loaded.
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
    except Exception as error:  # of many types; none can be handled here
        chosen = "" if hub.get("config") else "; if it has several configs, name one: task.hub.config=..."
        raise UserError(
            f"task.source={name}: the data set cannot be loaded ({said(error)}){chosen}"
        ) from error
    read = [
        _row(fields | {"split": ours}, f"{name}/{split}:{number}", prompt_words, columns)
        for ours, split in _splits(name, hub, list(found))
        for number, fields in enumerate(found[split])
    ]
    return _told(read, name)


def _splits(name: str, hub: Mapping[str, str | None], there: list[str]) -> list[tuple[str, str]]:
    """Pairs of our name of a split and the data set's name of it."""
    chosen: list[tuple[str, str]] = []
    for ours in SPLITS:
        asked = hub.get(ours)
        if asked is not None and asked not in there:
            raise UserError(f"task.hub.{ours}={asked}: {name} has no such split; it has {', '.join(there)}")
        splits = [asked] if asked else [split for split in there if HUB_SPLITS.get(split) == ours]
        chosen += [(ours, split) for split in splits]
    if not chosen:
        raise UserError(
            f"task.source={name} has the splits {', '.join(there)}; choose one: task.hub.train=..."
        )
    return chosen


def hold_out(rows: list[Row], count: int, source: str) -> tuple[list[Example], list[Example]]:
    """Training rows and held-out rows.

    Rows that name a split stay in it. If no row is in ``val``, ``count`` rows are held out, the same in every run.

    Raises:
        UserError: when no row would be left to train on.
    """
    train = [row.example for row in rows if row.split != "val"]
    val = [row.example for row in rows if row.split == "val"]
    if val:
        if not train:
            raise UserError(f"task.source={source} has no row to train on: all are held out (split: val)")
        return train, val
    if len(train) < 2:
        raise UserError(
            f"task.source={source} has {counted(len(train), 'row')}; training and validation need one each"
        )
    if not 0 < count < len(train):
        raise UserError(
            f"task.held_out={count}, but task.source={source} has {counted(len(train), 'row')}; give task.held_out "
            f"from 1 to {len(train) - 1}, or mark the rows to hold out with split: val"
        )
    order = permutation(len(train), HELD_OUT_KEY)
    return [train[row] for row in order[count:]], [train[row] for row in order[:count]]


def _told(read: list[Row | None], source: str) -> list[Row]:
    """The rows, without texts of one word, which a warning counts."""
    rows = [row for row in read if row is not None]
    if len(rows) < len(read):
        log.warning(
            "task.source=%s: %d of %d rows are left out: a text of one word cannot be cut into prompt and completion",
            source,
            len(read) - len(rows),
            len(read),
        )
    return rows


def _row(fields: Any, where: str, prompt_words: int, columns: Columns) -> Row | None:
    """The row that the fields describe; None for a text of one word, which cannot be cut in two."""
    if not isinstance(fields, dict):
        raise UserError(
            f'{where}: {fields!r:.60} is not an object; give {{"prompt": ...}} or {{"text": ...}}'
        )
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
        return Row(Example(prompt, completion, reference, where), split)
    if "text" in fields:
        words = _text(fields, "text", where).split()
        cut = min(prompt_words, len(words) - 1)
        if not cut:
            return None
        return Row(Example(" ".join(words[:cut]), " " + " ".join(words[cut:]), reference, where), split)
    raise UserError(
        f"{where}: neither prompt nor text is among the fields {sorted(fields)}; name one: task.columns.prompt=..."
    )


def _text(fields: dict[str, Any], name: str, where: str) -> str:
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {name} is {value!r:.60}; it must be a text that is not empty")
    return value
