"""metrics.csv: one row per iteration, in whatever order metrics arrive, and intact after a crash."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from policylab.callbacks.metrics_csv import MetricsCSV
from policylab.runs.metrics_file import best_row, curves_of, read_rows, validated
from policylab.runs.resume import rewind


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


NAMES = ("val/reward/short, plain", 'val/reward/a "b"', "val/reward/;' #", "val/reward/\u00e9", "val/")


def test_any_name_of_a_metric_is_written_and_read(tmp_path, path):
    """Commas and quotes in names shift no column; a resumed run keeps all rows."""
    rows = [{"iteration": step} | {name: step + i / 8 for i, name in enumerate(NAMES)} for step in range(3)]
    for part in (rows[:2], rows[2:]):  # two sessions
        logger = MetricsCSV(str(tmp_path))
        for row in part:
            logger.log_metrics({name: row[name] for name in NAMES}, step=row["iteration"])
        assert read_rows(path) == rows[: part[-1]["iteration"] + 1]
    rewind(tmp_path, 2, validates=False)
    assert read_rows(path) == rows
    assert curves_of(read_rows(path)) == {
        name: {row["iteration"]: row[name] for row in rows} for name in NAMES
    }


def test_a_resume_keeps_samples_with_odd_line_ends(tmp_path):
    lines = [
        json.dumps({"iteration": 1, "split": "val", "completion": f"a{c}b"}, ensure_ascii=False)
        for c in "\u2028\x85\x0b"
    ]
    (tmp_path / "samples.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    rewind(tmp_path, 2, validates=True)
    assert (tmp_path / "samples.jsonl").read_text(encoding="utf-8").split("\n") == [*lines, ""]


def test_a_step_is_required(tmp_path):
    with pytest.raises(ValueError, match="step"):
        MetricsCSV(str(tmp_path)).log_metrics({"x": 1})


@pytest.mark.slow
def test_kill_loses_the_current_iteration_at_most(tmp_path, path):
    """A process logs without pause and prints each finished step; after ``kill -9`` the file has all printed steps."""
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
        {"iteration": 0, "m": 9.0 if mode == "max" else -9.0},  # before training
        {"iteration": 1, "m": -1.0},
        {"iteration": 2, "m": 3.0},
        {"iteration": 3, "m": 3.0},
        {"iteration": 4},
        {"iteration": 5, "m": math.nan},
    ]
    assert best_row(rows, "m", mode)["iteration"] == iteration
    assert best_row(rows, "other", mode) is None


def test_validated_rows():
    assert validated([{"iteration": 1, "train/x": 1}, {"iteration": 2, "val/x": 1}]) == [
        {"iteration": 2, "val/x": 1}
    ]
