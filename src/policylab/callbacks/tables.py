"""Parts of the console output, as rich renderables. Without torch, so that it can be imported before the libraries."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from policylab.distributed.world import world
from policylab.errors import counted
from policylab.runs.figures import headlines, number
from policylab.user_code import cut

if TYPE_CHECKING:
    from policylab.data.rollout import Sample

log = logging.getLogger(__name__)

PLAIN_WIDTH = 110
#: Options of rich's consoles: otherwise brackets are styles, ``:x:`` is an emoji, and numbers are coloured.
PLAIN_TEXT: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False}
SAMPLE_WIDTH = 160
#: Groups that the tree of the config omits: they do not change training, or the header shows them.
SIDE = ("paths", "callbacks", "logger", "init")


class LoggedConsole(Console):
    """A console that also writes its lines to ``train.log``, as plain text, even if it is quiet.

    It prints brackets and ``:names:`` unchanged; only `Text` has styles.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**PLAIN_TEXT, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Prints to the console and to the log."""
        super().print(*objects, **options)
        self.note(*objects, **options)

    def note(self, *objects: Any, **options: Any) -> None:
        """Writes to the log only."""
        if not (log.isEnabledFor(logging.INFO) and world().main):
            return
        page = io.StringIO()
        Console(file=page, width=PLAIN_WIDTH, color_system=None, **PLAIN_TEXT).print(*objects, **options)
        lines = [line.rstrip() for line in page.getvalue().strip("\n").split("\n")]
        if any(lines):
            log.info("%s", "\n".join(lines if len(lines) == 1 else ["", *lines]))


@cache
def console() -> LoggedConsole:
    """The console of this process. There is one, so that lines are printed above a progress bar."""
    probe = LoggedConsole()
    if probe.is_terminal:
        return probe
    return LoggedConsole(width=int(os.environ.get("COLUMNS", PLAIN_WIDTH)))


def rows(pairs: Sequence[tuple[str, str]]) -> Table:
    """A table of labels and values."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in pairs:
        table.add_row(label, Text(value))
    return table


def to_copy(pairs: Sequence[tuple[str, str]]) -> Text:
    """Lines of labels and values. Print them with ``soft_wrap``, so that no path or command is broken."""
    width = max(len(label) for label, _ in pairs) + 2
    return Text("\n").join(Text.assemble((label.ljust(width), "dim"), value) for label, value in pairs)


def config_tree(config: Mapping[str, Any], overrides: Sequence[str]) -> Tree:
    """The config, one branch for each group; a star marks values that the command line changed.

    Args:
        config: plain containers.
        overrides: of the command line, such as ``algo=ppo`` or ``+optim.lr=1e-5``.
    """
    changed = {word.split("=", 1)[0].lstrip("+~").split("@")[0].replace("/", "."): word for word in overrides}
    tree = Tree(Text.assemble("config", ("  (* from the command line)" if changed else "", "dim")))
    tree.add(
        _values({key: value for key, value in config.items() if not isinstance(value, dict)}, "", changed)
    )
    groups = {key: value for key, value in config.items() if isinstance(value, dict)}
    for key, group in groups.items():
        if key in SIDE:
            continue
        name = group.get("name") or str(group.get("_target_", "")).rsplit(".", 1)[-1]
        branch = tree.add(_entry(key, name, key in changed))
        values = {k: v for k, v in group.items() if k != "name" and not k.startswith("_")}
        parts = {k: v for k, v in values.items() if isinstance(v, dict)}
        if single := {k: v for k, v in values.items() if k not in parts}:
            branch.add(_values(single, f"{key}.", changed))
        for part, value in parts.items():
            inside = any(c.startswith(f"{key}.{part}.") for c in changed)
            branch.add(_entry(part, _brief(value), f"{key}.{part}" in changed or inside))
    for key in ("callbacks", "logger"):
        names = ", ".join(name for name, value in (groups.get(key) or {}).items() if value)
        tree.add(_entry(key, names, any(c == key or c.startswith(f"{key}.") for c in changed)))
    for key, word in changed.items():
        if key.split(".")[0] not in config:  # debug=..., experiments=...: they change other groups
            tree.add(_entry(*word.partition("=")[::2], True))
    return tree


def _values(values: Mapping[str, Any], prefix: str, changed: Mapping[str, str]) -> Text:
    """Single values on one line, without null and empty ones, unless the command line set them."""
    entries = [
        _entry(key, value, prefix + key in changed)
        for key, value in values.items()
        if value not in (None, []) or prefix + key in changed
    ]
    return Text("   ").join(entries)


def _entry(key: str, value: object, changed: bool) -> Text:
    if changed:
        return Text(f"{key} {value} *", style="bold yellow")
    return Text.assemble((key, "cyan"), f" {value}")


def _brief(value: Any) -> str:
    """A value on one line; a node with a ``_target_`` looks like a call."""
    if not isinstance(value, dict):
        return str(value)
    inner = ", ".join(f"{k}={_brief(v)}" for k, v in value.items() if k != "_target_")
    if "_target_" in value:
        return f"{str(value['_target_']).rsplit('.', 1)[-1]}({inner})"
    return inner


def before_after(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """Validation metrics before and after training."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("validation")
    for name in ("before", "after", "change"):
        table.add_column(name, justify="right")
    for i, name in enumerate(headlines(after)):
        value, first = after[name], before.get(name)
        change = "-" if first is None else ("+" if value > first else "") + number(value - first)
        table.add_row(name, number(first), number(value), change, style="" if i else "bold")
    return table


def one_line(text: str, limit: int = SAMPLE_WIDTH) -> str:
    """Text on one line, shortened to a limit."""
    return cut(" ".join(text.split()), limit)


def pick(samples: Sequence[Sample], count: int) -> list[Sample]:
    """Samples from the best to the worst, evenly spaced by rank of reward."""
    ranked = sorted(samples, key=lambda sample: sample.reward, reverse=True)
    if count >= len(ranked) or count == 1:
        return ranked[:count]
    return [ranked[round(i * (len(ranked) - 1) / (count - 1))] for i in range(count)]


def samples_table(samples: Sequence[Sample]) -> Table:
    """A row for each sample: reward, KL, length, prompt and completion."""
    table = Table.grid(padding=(0, 2))
    for _ in range(3):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold")
    for sample in samples:
        cut = "" if sample.ended else " ..."
        text = Text.assemble((one_line(sample.prompt, 80) + " | ", "dim"), one_line(sample.completion) + cut)
        kl = "" if sample.kl is None else f"kl {round(sample.kl, 2) + 0.0:.2f}"  # no -0.00
        table.add_row(f"  {round(sample.reward, 3) + 0.0:+.3f}", kl, counted(sample.length, "token"), text)
    return table
