"""The walks of docs/inside.md name at most a dozen functions each. These exist in the named files, and a run calls them
in this order."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from types import FrameType
from typing import Any

import pytest

from doc_blocks import ROOT
from small_runs import algo, small, train

PACKAGE = ROOT / "src" / "policylab"
STEP = re.compile(r"`(?P<name>\w+)` in \[`(?P<file>[\w/]+\.py)`\]\(\.\./src/policylab/(?P=file)\)")
WALKS = re.split(r"^##+ ", (ROOT / "docs" / "inside.md").read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]


@cache
def functions(file: str) -> set[str]:
    """All functions and methods of a file."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("walk", WALKS, ids=lambda walk: walk.partition("\n")[0])
def test_every_step_of_a_walk_exists(walk: str) -> None:
    steps = re.findall(r"^\d+\. .+$", walk, re.MULTILINE)
    assert len(steps) <= 12
    for step in steps:
        found = STEP.match(step.partition(". ")[2])
        assert found, f"write `function` in [`file`](../src/policylab/file): {step}"
    for match in STEP.finditer(walk):
        assert match["name"] in functions(match["file"]), f"there is no {match['name']} in {match['file']}"


@pytest.mark.parametrize("title", ["A prompt", "A reward"])
def test_a_run_calls_the_steps_in_order(title: str) -> None:
    (walk,) = (walk for walk in WALKS if walk.partition("\n")[0] == title)
    steps = [
        found.groups() for line in walk.splitlines() if (found := STEP.search(line)) and line[0].isdigit()
    ]
    config = small(algo("ppo"), {"iterations": 1})
    order = list[tuple[str, str]]()

    def note(frame: FrameType, event: str, _: Any) -> None:
        call = (frame.f_code.co_name, frame.f_code.co_filename.rpartition("policylab/")[2])
        if event == "call" and call in steps and call not in order:
            order.append(call)

    train(config, reward=None)  # imports what a run needs: slow under a profiler
    sys.setprofile(note)
    try:
        train(config, reward=None)
    finally:
        sys.setprofile(None)
    assert order == steps
