"""The import rule: each part of the package imports only what it may, and ``--help`` does not import torch."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "policylab"
FILES = sorted(PACKAGE.rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py"))
HEAVY = ("torch", "lightning", "transformers", "torchmetrics", "matplotlib", "scipy", "wandb")

# library -> the only files that may import it
OWNERS = {
    "lightning": (
        *("training/", "callbacks/", "launch/", "config/build.py", "tasks/datamodule.py", "runs/writing.py"),
        *("distributed/cluster.py", "distributed/sharded_strategy.py"),
    ),
    "transformers": ("models/", "rollouts/"),
    "hydra": ("config/", "cli/", "launch/", "runs/", "sweeps/"),
    # other parts must not depend on the kind of algorithm: they use `policylab.training.methods`
    "policylab.algorithms": ("algorithms/", "training/"),
    "policylab.training": ("training/", "config/build.py", "planning/"),
}

# part of the package -> all that it may import besides the standard library
MAY_IMPORT = {
    "functional/": ("torch", "jaxtyping", "policylab.functional"),
    "algorithms/": (
        *("torch", "jaxtyping", "policylab.errors", "policylab.contracts"),
        *("policylab.functional", "policylab.data", "policylab.algorithms"),
    ),
}


@pytest.fixture(scope="module")
def house() -> ModuleType:
    """``scripts/house.py``."""
    spec = importlib.util.spec_from_file_location("house", ROOT / "scripts" / "house.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _within(name: str, parents: tuple[str, ...]) -> bool:
    return any(name == parent or name.startswith(parent + ".") for parent in parents)


def _part(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


@pytest.mark.parametrize("path", FILES, ids=_part)
def test_each_part_imports_only_what_it_may(path: Path, house: ModuleType) -> None:
    part = _part(path)
    imports = set(house.imported(ast.parse(path.read_text()), for_types=False))
    for library, owners in OWNERS.items():
        if not part.startswith(owners):
            guilty = {name for name in imports if _within(name, (library,))}
            assert not guilty, f"{part} imports {guilty}; only {owners} may import {library}"
    for prefix, allowed in MAY_IMPORT.items():
        if part.startswith(prefix):
            standard = tuple(sys.stdlib_module_names)
            guilty = {name for name in imports if not _within(name, allowed + standard)}
            assert not guilty, f"{part} imports {guilty}; {prefix} may import {allowed} only"


def test_no_room_imports_from_a_floor_above_and_no_files_import_each_other(house: ModuleType) -> None:
    edges = house.graph()
    assert house.upward(edges) == []
    assert house.circles(edges) == []


def test_the_house_sees_an_upward_import_and_a_circle(house: ModuleType) -> None:
    edges = {"data.a": {"runs.b"}, "runs.b": {"runs.c"}, "runs.c": {"runs.b", "errors"}, "errors": set()}
    assert house.upward(edges) == ["data.a imports runs.b"]
    assert house.circles(edges) == ["runs.b <-> runs.c"]


def test_a_room_without_a_floor_is_told(house: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setattr(house, "files", lambda: {"attic.a": Path("a.py"), "errors": Path("e.py")})
    monkeypatch.setattr(house, "graph", lambda: {"attic.a": {"errors"}, "errors": set()})
    assert house.main([]) == 2
    assert capsys.readouterr().err == "attic: give each a floor in FLOORS of scripts/house.py\n"


def test_the_walk_sees_nested_and_from_imports(house: ModuleType) -> None:
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    import lightning
def f():
    from policylab import training
    import transformers.utils
"""
    assert set(house.imported(ast.parse(source), for_types=False)) == {
        "typing.TYPE_CHECKING",
        "policylab.training",
        "transformers.utils",
    }


@pytest.mark.parametrize(
    "code",
    [
        "import policylab, policylab.errors, policylab.config, policylab.launch, policylab.cli, policylab.runs",
        "import policylab.config.resolvers",
        *(f"import {script.stem}" for script in SCRIPTS),
    ],
)
def test_light_modules_load_nothing_heavy(code: str) -> None:
    """``--help``, ``--cfg job`` and tab completion load only these; a heavy library would take seconds."""
    check = f"{code}; import sys; print([name for name in {HEAVY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_no_tracked_file_names_a_path_of_one_machine() -> None:
    """Results, configs and docs must be the same on every machine."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    private = re.compile(r"(?<![\w.$}-])/(?:work|root|home|Users|opt)/[\w.]+")
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue  # binary, or deleted and not yet committed
        found = private.search(text)
        assert not found, f"{name} names {found.group()!r}, a path of one machine"
