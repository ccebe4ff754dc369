"""Runs the tests and measurements for a GPU on a CPU, which only checks their code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "POLICYLAB_REHEARSE": "1", "PYTEST_ADDOPTS": ""},
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_tests() -> None:
    said = run(
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-n",
        "0",
        "-q",
        "tests/gpu",
        "-k",
        "gpt2 or qwen3 or grpo or fsdp or lora",
    )
    assert "passed" in said


@pytest.mark.slow
def test_measurements(tmp_path: Path) -> None:
    run("benchmarks/gpu.py", "--device", "cpu", "--quick", "--out", str(tmp_path))
    figures = (tmp_path / "figures.csv").read_text()
    assert {"rates", "decode", "tf32", "runs"} <= {line.split(",")[0] for line in figures.splitlines()}


def test_script_names_files_that_exist() -> None:
    script = (ROOT / "benchmarks/gpu.sh").read_text()
    subprocess.run(["bash", "-n", ROOT / "benchmarks/gpu.sh"], check=True)
    words = {
        word for word in script.replace('"', " ").split() if word.startswith(("tests/gpu/", "benchmarks/"))
    }
    files = {word for word in words if word.endswith(".py")}
    assert files
    assert all((ROOT / file).is_file() for file in files)
