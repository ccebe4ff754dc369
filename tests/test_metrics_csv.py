"""metrics.csv: one row an iteration, whatever arrives when, and whole after any crash."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from policylab.callbacks.metrics_csv import MetricsCSV
from policylab.callbacks.metrics_file import best_row, read_rows, validated


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.csv"


def test_file_reads_as_expected(tmp_path, path):
    logger = MetricsCSV(str(tmp_path))
    logger.log_metrics({"val/reward": 0.125}, step=0)
    logger.log_metrics({"train/reward": 0.5}, step=1)
    logger.log_metrics({"train/reward": 2.0}, step=2)
    assert path.read_text() == "iteration,val/reward,train/reward\n0,0.125,\n1,,0.5\n2,,2\n"


def test_training_and_validation_of_an_iteration_share_a_row(tmp_path, path):
    logger = MetricsCSV(str(tmp_path))
    logger.log_metrics({"val/reward": 0.0}, step=0)
    for step in (1, 2):
        logger.log_metrics({"train/reward": step / 10}, step=step)
    logger.log_metrics({"val/reward": 1.5}, step=2)
    logger.log_metrics({"train/kl_k1": 0.25}, step=2)
    logger.log_metrics({"train/reward": 0.3}, step=3)
    assert read_rows(path) == [
        {"iteration": 0, "val/reward": 0.0},
        {"iteration": 1, "train/reward": 0.1},
        {"iteration": 2, "train/reward": 0.2, "val/reward": 1.5, "train/kl_k1": 0.25},
        {"iteration": 3, "train/reward": 0.3},
    ]


@pytest.mark.parametrize("value", [0.1 + 0.2, 1e-300, -1.7e308, 12345678901234567.0, math.pi, math.inf])
def test_numbers_come_back_bit_for_bit(tmp_path, path, value):
    MetricsCSV(str(tmp_path)).log_metrics({"x": value}, step=1)
    assert read_rows(path)[0]["x"] == value


def test_nan_is_written(tmp_path, path):
    MetricsCSV(str(tmp_path)).log_metrics({"x": math.nan}, step=1)
    assert math.isnan(read_rows(path)[0]["x"])


def test_every_row_is_on_file_at_once(tmp_path, path):
    logger = MetricsCSV(str(tmp_path))
    for step in range(5):
        logger.log_metrics({"x": step}, step=step)
        assert [row["iteration"] for row in read_rows(path)] == list(range(step + 1))


def test_a_new_logger_continues_the_file(tmp_path, path):
    MetricsCSV(str(tmp_path)).log_metrics({"x": 1}, step=1)
    again = MetricsCSV(str(tmp_path))
    again.log_metrics({"y": 2}, step=1)
    again.log_metrics({"x": 3, "z": 4}, step=2)
    assert read_rows(path) == [{"iteration": 1, "x": 1, "y": 2}, {"iteration": 2, "x": 3, "z": 4}]


def test_a_row_cut_short_is_dropped(tmp_path, path):
    logger = MetricsCSV(str(tmp_path))
    for step in (1, 2):
        logger.log_metrics({"x": step, "y": step}, step=step)
    path.write_text(path.read_text()[:-3])
    assert read_rows(path) == [{"iteration": 1, "x": 1, "y": 1}]
    again = MetricsCSV(str(tmp_path))
    again.log_metrics({"x": 7, "y": 7}, step=2)
    assert path.read_text() == "iteration,x,y\n1,1,1\n2,7,7\n"


def test_a_step_is_required(tmp_path):
    with pytest.raises(ValueError, match="step"):
        MetricsCSV(str(tmp_path)).log_metrics({"x": 1})


def test_kill_loses_the_current_iteration_at_most(tmp_path, path):
    """A process logs as fast as it can and tells each finished step; after ``kill -9`` all told steps are there."""
    script = (
        "from policylab.callbacks.metrics_csv import MetricsCSV\n"
        f"logger = MetricsCSV({str(tmp_path)!r})\n"
        "for step in range(10**6):\n"
        "    logger.log_metrics({'train/x': step}, step=step)\n"
        "    if step % 7 == 0: logger.log_metrics({'val/x': step}, step=step)\n"
        "    print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        told = [int(process.stdout.readline()) for _ in range(200)][-1]
        os.kill(process.pid, signal.SIGKILL)
    rows = read_rows(path)
    assert [row["iteration"] for row in rows] == list(range(len(rows)))
    assert len(rows) > told
    assert all(row["train/x"] == row["iteration"] for row in rows)


@pytest.mark.parametrize(("mode", "iteration"), [("max", 2), ("min", 1)])
def test_best_row(mode, iteration):
    rows = [
        {"iteration": 0, "m": math.nan},
        {"iteration": 1, "m": -1.0},
        {"iteration": 2, "m": 3.0},
        {"iteration": 3, "m": 3.0},
        {"iteration": 4},
    ]
    assert best_row(rows, "m", mode)["iteration"] == iteration
    assert best_row(rows, "other", mode) is None


def test_validated_rows():
    assert validated([{"iteration": 1, "train/x": 1}, {"iteration": 2, "val/x": 1}]) == [
        {"iteration": 2, "val/x": 1}
    ]
