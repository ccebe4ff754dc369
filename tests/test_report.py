"""The report: statistics against hand-computed numbers, and a whole report from small run folders."""

from __future__ import annotations

import csv
import json
import math
from fractions import Fraction
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from omegaconf import OmegaConf
from scipy import stats

from policylab.errors import UserError
from policylab.report.evidence import portable, write_evidence
from policylab.report.groups import group_runs
from policylab.report.read import read_run, read_runs
from policylab.report.statistics import estimate, holm, interquartile_mean, iqm_interval, p_above_zero


def test_estimate_of_five_seeds() -> None:
    # mean 3; s = sqrt((4+1+0+1+4)/4) = 1.5811; s/sqrt(5) = 0.70711; t(0.975, 4) = 2.77645; half = 1.96324
    # middle half: one of five cut at each end, (2+3+4)/3 = 3
    seeds = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (seeds.count, seeds.mean, seeds.iqm) == (5, 3.0, 3.0)
    assert seeds.low == pytest.approx(1.03676, abs=1e-5)
    assert seeds.high == pytest.approx(4.96324, abs=1e-5)


def test_estimate_of_two_seeds() -> None:
    # mean 1; s = sqrt(2); s/sqrt(2) = 1; t(0.975, 1) = 12.7062: the interval shows how little two seeds tell
    seeds = estimate([0.0, 2.0])
    assert seeds.low == pytest.approx(-11.7062, abs=1e-4)
    assert seeds.high == pytest.approx(13.7062, abs=1e-4)


def test_iqm_ignores_an_outlier_and_the_mean_does_not() -> None:
    seeds = estimate([0.5, 0.5, 0.5, 0.5, -9.5])
    assert (seeds.mean, seeds.iqm) == (-1.5, 0.5)


def test_one_seed_has_no_interval() -> None:
    seeds = estimate([0.25])
    assert (seeds.mean, seeds.iqm, seeds.low, seeds.high) == (0.25, 0.25, None, None)


def test_bootstrap_interval_of_the_iqm() -> None:
    assert iqm_interval([0.5]) is None
    # resamples of two: 0, 1, 1, 2, each a quarter
    assert iqm_interval([0.0, 2.0]) == (0.0, 2.0)
    # four: the middle pair is (0, 0) in the 4 x 3 + 1 of 256 resamples with three zeros or more, 5.1 %
    assert iqm_interval([0.0, 1.0, 10.0, 11.0]) == (0.0, 11.0)
    # five: of 3,125 resamples, sorted by the mean of their middle three, the 79th and the 3,047th, in fractions
    resamples = sorted(Fraction(sum(sorted(r)[1:4]), 3) for r in product(range(1, 6), repeat=5))
    assert (resamples[78], resamples[3046]) == (Fraction(4, 3), Fraction(14, 3))
    assert iqm_interval([5.0, 1.0, 4.0, 2.0, 3.0]) == pytest.approx((4 / 3, 14 / 3))


@pytest.mark.slow
def test_bootstrap_of_many_seeds_is_drawn_and_repeats() -> None:
    values = np.random.default_rng(1).normal(size=12)
    drawn = iqm_interval(list(values))
    assert drawn == iqm_interval(list(values))
    other = stats.bootstrap(
        (values,), interquartile_mean, n_resamples=20_000, method="percentile", confidence_level=0.95
    )
    assert drawn == pytest.approx(tuple(other.confidence_interval), abs=0.03)


def test_chance_of_a_gain() -> None:
    # t = 2 / 1 on 1 degree of freedom, where sf(t) = 1/2 - atan(t) / pi
    assert p_above_zero([1.0, 3.0]) == pytest.approx(0.5 - math.atan(2) / math.pi)
    assert p_above_zero([-1.0, -3.0]) == pytest.approx(0.5 + math.atan(2) / math.pi)
    assert (p_above_zero([1.0]), p_above_zero([1.0, 1.0]), p_above_zero([0.0, 0.0])) == (None, 0.0, 1.0)


def test_holm() -> None:
    # 0.01 x 3, 0.03 x 2, 0.04 x 1, none below the one before it
    assert holm([0.01, 0.04, None, 0.03]) == pytest.approx([0.03, 0.06, None, 0.06])
    assert holm([0.7, 0.8]) == [1.0, 1.0]


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]])
def test_estimate_refuses_values_without_a_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one finite value"):
        estimate(values)


def make_run(folder: Path, seed: int, after: float, status: str = "done", **changes: Any) -> Path:
    """A run folder as `train.py` writes it: baseline 0.1 at iteration 0, ``after`` at iteration 4."""
    folder.mkdir(parents=True)
    config = OmegaConf.create(
        {
            "seed": seed,
            "iterations": 4,
            "algo": {"name": "ppo"},
            "model": {"name": "tiny"},
            "task": {"name": "reviews", "source": "default"},
            "reward": {"name": "sentiment"},
            "optim": {"lr": 1e-3},
            "validation": {"every": 4, "prompts": 8},
            "paths": {"run": str(folder)},
        }
    )
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    OmegaConf.save(config, folder / "config.yaml")
    (folder / "status.json").write_text(json.dumps({"status": status}))
    if status == "done":
        (folder / "summary.json").write_text(
            json.dumps({"wall_seconds": 10.0 + seed, "tokens_sampled": 1000})
        )
    (folder / "metrics.csv").write_text(
        "iteration,train/reward,train/entropy,val/reward,val/kl\n"
        "0,,,0.1,0.0\n"
        f"2,{after / 2},3.5,,\n"
        f"4,{after},3.25,{after},{2.0 + seed}\n"
    )
    return folder


def report(runs: Any, out: Path, **changes: Any) -> str:
    settings: dict[str, Any] = {"metrics": ["val/reward", "val/kl"], "title": "", "labels": []}
    settings |= {"x": "iteration", "ranked": False, "at_kl": []}
    return write_evidence(runs, out, **{**settings, **changes})


def test_whole_report(tmp_path: Path) -> None:
    for seed, after in enumerate((0.6, 0.7, 0.8)):
        make_run(tmp_path / f"run_s{seed}", seed, after)
    table = report(f"{tmp_path}/run_*", tmp_path / "out", title="PPO on reviews")

    # after 0.7; gains 0.5, 0.6, 0.7: mean 0.6, s/sqrt(3) = 0.057735, t(0.975, 2) = 4.30265, half 0.248414
    # t = 0.6 / 0.057735 = 10.392 on 2 degrees: p = (1 - t / sqrt(2 + t^2)) / 2 = 0.0045662
    # the IQM of 3 cuts none; of 27 resamples one is all 0.6 (3.7 %: beyond 2.5 %), one all 0.8
    # KL (2+3+4)/3 = 3; seconds (10+11+12)/3 = 11
    row = (
        "| ppo-tiny-reviews | 3 | 0.100 | 0.700 | 0.700 [0.600, 0.800] | +0.600 [+0.352, +0.848] | 0.0046 "
        "| 3.0 | 11 | 1,000 |"
    )
    assert row in table.splitlines()
    assert (tmp_path / "out" / "table.md").read_text() == table
    assert (tmp_path / "out" / "curve.png").read_bytes().startswith(b"\x89PNG")

    with (tmp_path / "out" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["iteration"] for row in rows] == ["0", "2", "4"] * 3
    assert rows[-1] == {
        "run": "ppo-tiny-reviews",
        "seed": "2",
        "iteration": "4",
        "val/reward": "0.8",
        "val/kl": "4",
        "train/reward": "0.8",
        "train/entropy": "3.25",
    }
    config = OmegaConf.load(tmp_path / "out" / "config.yaml")
    assert config.seed == 0
    assert "paths" not in config


def test_groups_are_named_by_their_differences(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"a_s{seed}", seed, 0.5)
        make_run(tmp_path / f"b_s{seed}", seed, 0.5, optim__lr=2e-3)
        make_run(tmp_path / f"c_s{seed}", seed, 0.5, algo__name="reinforce")
    groups = group_runs(read_runs(f"{tmp_path}/*"))
    assert [(group.label, [run.seed for run in group.runs]) for group in groups] == [
        ("ppo optim.lr=0.001", [0, 1]),
        ("ppo optim.lr=0.002", [0, 1]),
        ("reinforce", [0, 1]),
    ]
    report(f"{tmp_path}/*_s?", tmp_path / "out", labels=["slow", "fast", "plain"])
    assert "| fast | 2 |" in (tmp_path / "out" / "table.md").read_text()


def make_tokens(run: Path, rows: dict[int, tuple[float | None, float | None]]) -> None:
    """Writes tokens sampled and reward by iteration; None leaves a cell empty."""
    lines = [",".join("" if x is None else f"{x:g}" for x in (i, *cells)) for i, cells in rows.items()]
    (run / "metrics.csv").write_text("\n".join(["iteration,train/tokens,val/reward", *lines, ""]))


def test_curves_over_tokens_are_interpolated_as_far_as_all_seeds_go(tmp_path: Path) -> None:
    first, second = (make_run(tmp_path / f"run_s{seed}", seed, 0.5) for seed in (0, 1))
    make_tokens(first, {0: (None, 0.0), 1: (60, None), 2: (100, 1.0)})
    make_tokens(second, {0: (None, 0.0), 1: (50, 1.0), 2: (200, 3.0)})
    (group,) = group_runs(read_runs(f"{tmp_path}/run_*"))
    curve = group.over_seeds("val/reward", "train/tokens")
    assert list(curve) == [0, 50, 100]
    # at 50 (1/2 + 1) / 2; at 100 (1 + (1 + 2 x 50/150)) / 2
    assert [point.mean for point in curve.values()] == pytest.approx([0.0, 0.75, 4 / 3])
    assert list(group.over_seeds("val/reward", "iteration")) == [0, 2]

    report(f"{tmp_path}/run_*", tmp_path / "out", metrics=["val/reward"], x="train/tokens")
    assert (tmp_path / "out" / "metrics.csv").read_text().splitlines()[:3] == [
        "run,seed,iteration,train/tokens,val/reward",
        "ppo-tiny-reviews,0,0,0,0",
        "ppo-tiny-reviews,0,2,100,1",
    ]
    with pytest.raises(UserError, match="x is seconds; choose iteration or train/tokens"):
        report(f"{tmp_path}/run_*", tmp_path / "out", x="seconds")
    plain = make_run(tmp_path / "plain", 0, 0.5)
    with pytest.raises(UserError, match="plain has no train/tokens to draw val/reward by"):
        report(str(plain), tmp_path / "out", x="train/tokens")


def test_comparison_of_many_methods(tmp_path: Path) -> None:
    for number in range(9):  # one more than the number of colours
        for seed in (0, 1, 2):
            after = 0.1 + 0.1 * number + 0.01 * seed
            make_run(tmp_path / f"{number}_s{seed}", seed, after, algo__name=f"method{number}")
    table = report(f"{tmp_path}/?_s?", tmp_path / "out", ranked=True)
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| method")]
    assert [row[0] for row in rows] == [f"| method{number}" for number in reversed(range(9))]
    # gains 0, 0.01, 0.02: t = sqrt(3) on 2 degrees: (1 - sqrt(3/5)) / 2 = 0.1127, the largest: times 1
    assert rows[-1][6] == "0.11"
    # gains 0.80, 0.81, 0.82: t = 0.81 sqrt(3) / 0.01 = 140.3: 1 / (2 t^2) = 2.5e-5, the smallest: times 9
    assert rows[0][6] == "0.00023"
    for figure in ("curve.png", "ranking.png"):
        assert (tmp_path / "out" / figure).read_bytes().startswith(b"\x89PNG")


def test_comparison_at_equal_kl(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"run_s{seed}", seed, 0.5)
    # Seed 0 comes back before it goes further: at 3 nats it first was between (2, 0.3) and (4, 0.5).
    (tmp_path / "run_s0" / "metrics.csv").write_text(
        "iteration,val/reward,val/kl\n0,0.1,0\n1,0.3,2\n2,0.9,1.5\n3,0.5,4\n"
    )
    report(f"{tmp_path}/run_*", tmp_path / "out", at_kl=[3.5, 3])
    header, _, row, *_ = (tmp_path / "out" / "frontier.md").read_text().splitlines()
    assert header == "| run | seeds | at 3 nats | at 3.5 nats |"
    # Seed 1 ends at (3, 0.5), so 0.4 and 0.5 at 3 nats: s / sqrt(2) = 0.05, t(0.975, 1) = 12.7062
    assert row == "| ppo-tiny-reviews | 2 | 0.450 [-0.185, 1.085] | - (1 of 2) |"
    assert (tmp_path / "out" / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_evidence_is_read_again(tmp_path: Path) -> None:
    """Its figures can be drawn without the runs, and its rows stay the same."""
    for seed in (0, 1):
        make_run(tmp_path / f"a_s{seed}", seed, 0.5)
        make_run(tmp_path / f"b_s{seed}", seed, 0.6, algo__name="a2c")
    report(f"{tmp_path}/?_s?", tmp_path / "out")
    report(str(tmp_path / "out"), tmp_path / "again", at_kl=[1])
    for name in ("metrics.csv", "config.yaml"):
        assert (tmp_path / "again" / name).read_text() == (tmp_path / "out" / name).read_text()
    # half way from 0.1 to 0.5 by 2 nats, a third by 3: 0.3 and 0.2333
    assert "| ppo | 2 | 0.267 [-0.157, 0.690] |" in (tmp_path / "again" / "frontier.md").read_text()
    run = make_run(tmp_path / "more", 2, 0.5)
    with pytest.raises(UserError, match="several groups of runs are called ppo"):
        report([str(tmp_path / "out"), str(run)], tmp_path / "mixed", labels=["ppo", "a2c", "ppo"])


def test_a_run_that_did_not_finish_is_left_out_and_named_unless_its_path_is_given(tmp_path: Path) -> None:
    good = make_run(tmp_path / "good", 0, 0.5)
    failed = make_run(tmp_path / "bad", 1, 0.2, status="failed")
    killed = make_run(tmp_path / "killed", 2, 0.2, status="running")
    (killed / "metrics.csv").unlink()
    assert [run.folder for run in read_runs(f"{tmp_path}/*")] == [good]
    table = report(f"{tmp_path}/*", tmp_path / "out")
    assert (
        f"Left out, as not finished: {tmp_path.name}/bad (failed), {tmp_path.name}/killed (running)." in table
    )
    assert table == (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(UserError, match=r"no run at .*; not finished: .*bad"):
        read_runs(f"{tmp_path}/b*")
    table = report([f"{tmp_path}/good", str(failed)], tmp_path / "out")
    assert "Seed 1 of ppo-tiny-reviews is failed after iteration 4." in table


def test_refusals(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0, 0.5)
    again = make_run(tmp_path / "again", 0, 0.5)
    other = make_run(tmp_path / "other", 1, 0.5, validation__prompts=16)
    diverged = make_run(tmp_path / "diverged", 1, float("nan"))
    out = tmp_path / "out"
    for runs, message in (
        (f"{tmp_path}/none/*", "no run at"),
        ([str(tmp_path.parent)], "not a run folder"),
        ([str(tmp_path)], "seed 0 of the same experiment appears 2 times|not comparable"),
        ([str(run), str(again)], "seed 0 of the same experiment appears 2 times"),
        ([str(run), str(other)], "not comparable: validation.prompts is 8 .* and 16"),
        ([str(run), str(diverged)], "val/reward is nan at iteration 4"),
    ):
        with pytest.raises(UserError, match=message):
            report(runs, out)
    with pytest.raises(UserError, match=r"no val/bleu; it has val/kl, val/reward"):
        report([str(run)], out, metrics=["val/bleu"])
    with pytest.raises(UserError, match="2 labels for 1 group of runs: ppo-tiny-reviews"):
        report([str(run)], out, labels=["a", "b"])
    with pytest.raises(UserError, match=f"out={run} is the folder of a run"):
        report([str(run)], run)
    with pytest.raises(UserError, match=f"out={run}/metrics.csv is a file"):
        report([str(run)], run / "metrics.csv")
    with pytest.raises(UserError, match="metrics is empty"):
        report([str(run)], out, metrics=[])
    assert not out.exists()


def test_run_without_baseline_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0, 0.5)
    (run / "metrics.csv").write_text("iteration,val/reward,val/kl\n4,0.5,1.0\n")
    with pytest.raises(UserError, match="no val/reward at iteration 0"):
        report([str(run)], tmp_path / "out")


def test_rows_of_one_iteration_are_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 0, 0.5)
    (run / "metrics.csv").write_text("iteration,train/reward,val/reward\n4,0.3,\n4,,0.5\n0,,0.1\n")
    assert read_run(run).curves == {"train/reward": {4: 0.3}, "val/reward": {0: 0.1, 4: 0.5}}


def test_portable_config_names_no_folder_of_this_machine() -> None:
    config = {
        "paths": {"repo": "/srv/lab", "run": "/srv/lab/logs/a"},
        "task": {"source": "/srv/lab/data/a.jsonl", "seeds": [1, 2]},
        "logger": {"csv": {"run_dir": "/srv/lab/logs/a"}},
        "model": {"path": str(Path.home() / "models")},
    }
    assert portable(config) == {
        "task": {"source": "data/a.jsonl", "seeds": [1, 2]},
        "logger": {"csv": {"run_dir": "${paths.run}"}},
        "model": {"path": "~/models"},
    }


def test_seeds_derived_from_the_seed_do_not_split_a_group_and_the_tasks_own_seed_does(tmp_path: Path) -> None:
    for seed in (0, 1):
        make_run(tmp_path / f"a_s{seed}", seed, 0.5, model__seed=seed, logger__run_dir=f"a_s{seed}")
    (group,) = group_runs(read_runs(f"{tmp_path}/*"))
    assert (group.label, len(group.runs)) == ("ppo-tiny-reviews", 2)
    make_run(tmp_path / "b", 2, 0.5, task__seed=7)
    with pytest.raises(UserError, match=r"not comparable: task.seed is None .* and 7"):
        group_runs(read_runs(f"{tmp_path}/*"))
