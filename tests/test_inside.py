"""The walks of docs/inside.md name at most a dozen functions each, and these exist in the named files."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from doc_blocks import ROOT

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
