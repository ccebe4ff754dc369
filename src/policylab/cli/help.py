"""The page that ``--help`` prints. Hydra's own page takes more than a second with so many groups."""

from __future__ import annotations

import re
from pathlib import Path

DEFAULT = re.compile(r"^  - (?P<group>[\w/]+): (?P<choice>[\w-]+)(?:\s+# (?P<comment>.*))?$")
NOT_SHOWN = ("hydra", "paths")
WIDTH = 110


def help_page(doc: str, script: Path) -> str:
    """How to use a root script: its docstring, its config groups, and its own values with their comments.

    Args:
        doc: docstring of the script.
        script: its path; ``configs/<name>.yaml`` beside it is its config.
    """
    text = (script.parent / "configs" / f"{script.stem}.yaml").read_text(encoding="utf-8")
    defaults = {match["group"]: match for line in text.splitlines() if (match := DEFAULT.match(line))}
    sections = [doc.strip()]
    groups = list_groups(script.parent)
    if "algo" not in defaults:  # not the training script: only a few groups
        groups = {
            name: groups[name] for name, match in defaults.items() if match["comment"] and name in groups
        }
    if groups:
        lines = [describe(group, choices, defaults.get(group)) for group, choices in groups.items()]
        sections.append("Groups: group=choice (* is the default)\n\n" + "\n".join(lines))
    sections.append("Values: name=value, or group.name=value\n\n" + own_values(text))
    sections.append(
        "All values, with your overrides: --cfg job. Hydra's own flags: --hydra-help. More: docs/runs.md"
    )
    return "\n\n".join(sections)


def list_groups(root: Path) -> dict[str, list[str]]:
    """Choices of each config group, and the recipes of ``experiments/``."""
    configs = root / "configs"
    folders = [path for path in sorted(configs.rglob("*")) if path.is_dir()]
    groups = {str(path.relative_to(configs)): path for path in folders} | {
        "experiments": root / "experiments"
    }
    found = {name: sorted(file.stem for file in path.glob("*.yaml")) for name, path in groups.items()}
    return {
        name: choices for name, choices in found.items() if choices and name.split("/")[0] not in NOT_SHOWN
    }


def describe(group: str, choices: list[str], default: re.Match[str] | None) -> str:
    """A group on one line, or on several if its choices do not fit."""
    marked = [choice + ("*" if default and choice == default["choice"] else "") for choice in choices]
    comment = f"   # {default['comment']}" if default and default["comment"] else ""
    lines, line = [], f"  {group:<16}"
    for i, word in enumerate(marked):
        word += "," if i < len(marked) - 1 else comment
        if len(line) + len(word) > WIDTH and line.strip():
            lines.append(line)
            line = " " * 18
        line += " " + word
    return "\n".join([*lines, line])


def own_values(text: str) -> str:
    """The part of a main config after its defaults list, with its comments."""
    lines = text.splitlines()
    if "defaults:" in lines:
        start = lines.index("defaults:") + 1
        lines = lines[next(i for i in range(start, len(lines)) if not lines[i].startswith(" ")) :]
    return "\n".join(f"  {line}" for line in "\n".join(lines).strip().splitlines())
