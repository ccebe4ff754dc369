"""docs/defaults.md has the values of the composed YAML, for every preset."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from small_runs import quick

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "defaults.md"
CODE = re.compile(r"`([^`]+)`")
EVERY = "every"  # in the first column: each preset that has the key, and no row of its own on it
OURS = "ours"
DEFAULT = "ppo"  # has each key of such rows, so that a misspelt one is found
# Methods that learn from data instead of rollouts are not on the page.
OTHERS = {"sft", "reward_model", "dpo"}
PRESETS = sorted({path.stem for path in (ROOT / "configs" / "algo").glob("*.yaml")} - OTHERS)

Compose = Callable[..., DictConfig]


@dataclass(frozen=True)
class Row:
    """A table row: its presets and other overrides, its keys, and our values."""

    line: int
    presets: list[str]
    overrides: list[str]
    keys: list[str]
    values: list[str]
    ours: str


def cells(line: str) -> list[str]:
    """``| a | b |`` gives ``["a", "b"]``."""
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def rows(text: str) -> list[Row]:
    """The rows of every table that has a column with our values."""
    found, ours = list[Row](), -1
    for number, line in enumerate(text.splitlines(), 1):
        if not line.startswith("|"):
            ours = -1
        elif ours < 0:
            header = cells(line)
            ours = header.index(OURS) if OURS in header else -1
        elif not set(line) <= set("|- "):
            row = cells(line)
            words, keys, values = (CODE.findall(row[column]) for column in (0, 1, ours))
            presets = [word for word in words if "=" not in word]
            overrides = [word for word in words if "=" in word]
            found.append(Row(number, presets, overrides, keys, values, row[ours]))
    return found


ROWS = rows(PAGE.read_text())


def presets_of(row: Row) -> list[str]:
    """The presets of a row."""
    if EVERY not in row.presets:
        return row.presets
    others = [other for other in ROWS if set(other.keys) & set(row.keys) and other.overrides == row.overrides]
    own = {preset for other in others for preset in other.presets}
    return [preset for preset in PRESETS if preset not in own]


@dataclass(frozen=True)
class Composed:
    """A config, and the option that was chosen of each group."""

    config: DictConfig
    choices: dict[str, Any]


def composed_value(composed: Composed, key: str) -> Any:
    """The value of a key; or the chosen option of a config group (``algo/kl``), or a constant (``policylab.x.Y``).

    Raises:
        KeyError: the preset has no such key.
    """
    if "/" in key:
        return composed.choices[key]
    if key.startswith("policylab."):
        return get_object(key)
    node = composed.config
    *parents, last = key.split(".")
    for parent in parents:
        if not OmegaConf.is_dict(node) or parent not in node:
            raise KeyError(key)
        node = node[parent]
    if not OmegaConf.is_dict(node) or last not in node:
        raise KeyError(key)
    value = node[last]
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


@pytest.mark.parametrize("preset", quick(PRESETS))
def test_our_figures_are_those_of_the_config(compose: Compose, preset: str) -> None:
    composed, checked = dict[tuple[str, ...], Composed](), 0
    for row in ROWS:
        if preset not in presets_of(row):
            continue
        more, own = tuple(row.overrides), preset in row.presets
        if more not in composed:
            config = compose([f"algo={preset}", *more])
            composed[more] = Composed(config, HydraConfig.get().runtime.choices)
        for key, value in zip(row.keys, row.values, strict=True):
            where = f"docs/defaults.md:{row.line}: {preset}"
            try:
                found = composed_value(composed[more], key)
            except KeyError:
                assert not own, f"{where} has no {key}"
                assert preset != DEFAULT, f"{where} has no {key}"
                continue
            said = yaml.safe_load(value)
            assert found == said, f"{where} has {key}={found}, the page says {said}"
            checked += own
    assert checked, f"docs/defaults.md has no row on {preset}"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"line{row.line}")
def test_every_row_names_what_it_is_about(row: Row) -> None:
    """Without a key, a value would not be checked."""
    assert row.presets, f"docs/defaults.md:{row.line}: no preset in backticks"
    unknown = set(row.presets) - {EVERY, *PRESETS}
    assert not unknown, f"docs/defaults.md:{row.line}: no preset is called {unknown}"
    assert row.keys, f"docs/defaults.md:{row.line}: no key in backticks"
    assert presets_of(row), f"docs/defaults.md:{row.line}: each preset has a row of its own"
    assert len(row.keys) == len(row.values), f"docs/defaults.md:{row.line}: {row.keys} but {row.values}"
    bare = CODE.sub("", row.ours)
    assert not re.search(r"\w", bare), f"docs/defaults.md:{row.line}: {bare!r} is not checked"


def test_the_reader_of_tables_reads() -> None:
    """The parser is tested on a known table, so that the tests above cannot pass because it finds no rows."""
    page: Sequence[str] = (
        "| preset | what | paper | ours | why |",
        "|---|---|---|---|---|",
        "| `ppo` `npg` `model=gpt2` | bounds `a.low` `a.high` | 0.1 | `0.2` `1.0e-3` | less |",
        "",
        "| a | table | of | other | things |",
        "|---|---|---|---|---|",
        "| 1 | 2 | 3 | 4 | 5 |",
    )
    assert rows("\n".join(page)) == [
        Row(3, ["ppo", "npg"], ["model=gpt2"], ["a.low", "a.high"], ["0.2", "1.0e-3"], "`0.2` `1.0e-3`")
    ]
