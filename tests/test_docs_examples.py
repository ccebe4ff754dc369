"""The examples in README and docs run unchanged.

A block whose first line names a file (``# my_reward.py``, ``# configs/model/mine.yaml``) is written to a
folder, as are those after it, until a bash block uses them in a ``python train.py``: that command is trained
briefly, with the folder as the current one and its ``configs/`` on the search path.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest

from conftest import Train
from doc_blocks import ROOT, Block, blocks

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Example:
    """Files to write, and the arguments of ``train.py`` that use them."""

    files: tuple[Block, ...]
    arguments: tuple[str, ...]


def examples() -> list[Example]:
    """Named blocks, each with the first training command after it."""
    found, files = list[Example](), list[Block]()
    for block in blocks(PAGES):
        if block.file_name:
            files.append(block)
        elif block.language == "bash" and files:
            command = next((words for words in block.commands if words[:2] == ["python", "train.py"]), None)
            assert command, f"{block.where}: {files[-1].file_name} waits for a command with python train.py"
            found.append(Example(tuple(files), tuple(command[2:])))
            files = []
    assert not files, f"{files[0].where}: no command uses {files[0].file_name}"
    return found


def page(example: Example) -> str:
    return example.files[0].where.partition(":")[0]


#: The first of each page in the fast tests.
EXAMPLES = [
    pytest.param(
        example, id=example.files[0].where, marks=[pytest.mark.slow] * (page(example) == page(before))
    )
    for before, example in pairwise([examples()[-1], *examples()])
]


def test_no_two_files_have_one_name():
    """A reader who follows all pages in one folder overwrites none."""
    named = [block for block in blocks(PAGES) if block.file_name]
    texts = {block.file_name: block.text for block in named}
    assert [block.where for block in named if block.text != texts[block.file_name]] == []


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(
    example: Example, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train_briefly: Train
) -> None:
    for block in example.files:
        path = tmp_path / str(block.file_name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
        sys.modules.pop(path.stem, None)  # another example may have used the name
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    own = f"hydra.searchpath=[file://{ROOT},file://{tmp_path}/configs]"
    run = train_briefly([*example.arguments, *([own] if (tmp_path / "configs").is_dir() else [])])
    assert (run / "summary.json").is_file()
