"""Every command of benchmarks/ and scripts/ in a quick form, and tests of their parts that measure no time."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import chaos
import estimator_variance
import scaling
import vs_trl
from kills import records
from kills.kinds import KINDS
from kills.settings import SETTINGS
from race import agreement, figures, ours, work
from race.figures import Lap, Ratio
from race.lane import Lane
from race.work import EOS, PAD, Work

ROOT = Path(__file__).parent.parent
WORK = Work("tiny", "grpo", "varied", "fp32", "separate", 4, 2, 16, 8, "cpu")


def lap(seconds: float) -> Lap:
    return Lap(seconds, rollout=seconds / 2, evaluation=0.0, loss=0.0, backward=seconds / 2, optimizer=0.0)


def test_schedule() -> None:
    assert WORK.schedule() == WORK.schedule()
    assert sorted(WORK.schedule()) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert replace(WORK, lengths="fixed").schedule() == [16] * 8
    assert min(replace(WORK, new_tokens=2).schedule()) == 1


def test_prompts_are_distinct_and_hold_no_special_id() -> None:
    prompts = WORK.prompt_ids(512)
    assert prompts == WORK.prompt_ids(512)
    assert len({tuple(ids) for ids in prompts}) == WORK.prompts
    assert all(PAD < i < 512 for ids in prompts for i in ids)


def test_work_survives_json() -> None:
    assert Work.from_json(WORK.to_json()) == WORK


def test_reward_looks_like_noise_of_unit_variance() -> None:
    draw = np.random.default_rng(0)
    for length in (4, 64):
        rewards = [work.reward(draw.integers(2, 2048, length).tolist()) for _ in range(2000)]
        assert abs(np.mean(rewards)) < 0.1
        assert abs(np.std(rewards) - 1) < 0.1
    assert work.reward([5, 9, EOS, PAD]) == work.reward([5, 9])


def test_digest_sees_ids_and_not_their_order() -> None:
    assert work.digest([[1, 2], [3]]) == work.digest([[3], [1, 2]])
    assert work.digest([[1, 2], [3]]) != work.digest([[2, 1], [3]])


def test_noise_ends_completions_on_schedule() -> None:
    class Engine:
        def sample(self, policy: object, prompts: object, size: int, noise: torch.Tensor, behaviour: object):
            return noise

    lane = object.__new__(Lane)  # without its file descriptors
    lane._clock = {}
    lengths = WORK.schedule()
    scheduled = ours.Scheduled(Engine(), lane, lengths)
    noise = scheduled.sample(None, (), 2, torch.zeros(8, 16))
    for row, length in zip(noise, lengths, strict=True):
        zeros = (row == 0).nonzero().squeeze(-1).tolist()
        assert zeros == ([length - 1] if length < 16 else [])
    assert (scheduled.sample(None, (), 1, torch.zeros(3, 16)) > 0).all()  # the preflight


def test_phases_add_up() -> None:
    clock = {"rollout": 2.0, "backward": 3.0, "optimizer": 0.5}
    mine = Lap.of({"seconds": 10.0, "update": 6.0, "clock": clock})
    assert mine == Lap(10.0, rollout=2.0, evaluation=2.0, loss=2.5, backward=3.0, optimizer=0.5)
    assert Lap.of({"seconds": 10.0, "clock": clock | {"before_loss": 4.0}}) == mine


def test_ratio_is_of_medians_and_its_spread_of_pairs() -> None:
    ratio = Ratio.of([(lap(1.0), lap(2.0)), (lap(2.0), lap(3.0)), (lap(4.0), lap(20.0))])
    assert ratio == Ratio(median=1.5, lowest=1.5, highest=5.0)


def test_tables() -> None:
    assert figures.table(["", "x"], [["a", "1.00"], ["bcd", "12.00"]]) == "         x\na     1.00\nbcd  12.00"
    shown = figures.side_by_side([(lap(1.0), lap(2.0))])
    assert [line.split()[:2] for line in shown.splitlines()[1:]] == [["ours", "1.000"], ["TRL", "2.000"]]


def test_rows_are_appended_under_one_header(tmp_path: Path) -> None:
    file = tmp_path / "results.csv"
    figures.append(file, {"race": "a", "ratio": 1.5})
    figures.append(file, {"race": "b", "ratio": 2.0})
    assert [row["race"] for row in csv.DictReader(file.open())] == ["a", "b"]
    with pytest.raises(ValueError, match="other columns"):
        figures.append(file, {"race": "c"})


def test_agreement(tmp_path: Path) -> None:
    for side, factor in (("ours", 1.0), ("theirs", 1.0005)):
        (tmp_path / side).mkdir()
        np.save(tmp_path / side / "policy.weight.npy", factor * np.arange(6.0, dtype=np.float32))
    np.save(tmp_path / "ours" / "critic.score.bias.npy", np.ones(1, dtype=np.float32))

    def found(race: Work, losses: tuple[float, float] = (0.5, 0.5)) -> agreement.Agreement:
        return agreement.compare(race, losses, tmp_path / "ours", tmp_path / "theirs")

    agreed = found(WORK)
    assert agreed.cosine == pytest.approx(1.0)
    assert agreed.length == pytest.approx(5e-4, rel=1e-2)
    assert (agreed.parameters, agreed.only_ours, agreed.only_theirs) == (6, ["critic.score.bias"], [])
    assert not agreed.refused
    assert found(WORK, losses=(0.5, 0.6)).refused
    assert not found(replace(WORK, algo="rloo"), losses=(0.5, 0.6)).refused
    np.save(tmp_path / "theirs" / "policy.weight.npy", np.arange(6.0, dtype=np.float32)[::-1])
    assert found(WORK).refused
    np.save(tmp_path / "theirs" / "policy.weight.npy", np.full(6, np.nan, dtype=np.float32))
    assert found(WORK).refused


def test_the_grid() -> None:
    names = [race.name for race in vs_trl.races(vs_trl.arguments(["--all"]))]
    assert len(names) == len(set(names)) == 8 + 16 + 16
    assert "gpt2-ppo-shared-varied-bf16" in names


@pytest.mark.parametrize("wrong", [["--runs", "0"], ["--group-size", "1"], ["--trl-micro-batch", "7"]])
def test_wrong_arguments_are_told(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vs_trl.arguments(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_record_is_flat_and_json() -> None:
    facts = {
        "rest_gib": 0.5, "peak_gib": 1.0, "threads": 2, "python": "3.12", "cpu": "a CPU", "gpu": "", "cores": 2,
        "commit": "0123456789abcdef", "dirty": True,
        "versions": {"policylab": "0.1", "trl": "1.10", "torch": "2.13", "transformers": "5.23"},
    }  # fmt: skip
    result = vs_trl.Result(WORK, [(lap(1.0), lap(2.0))] * 5, None, facts, facts)
    row = json.loads(json.dumps(vs_trl.record(result)))
    assert (row["ratio"], row["runs"], row["commit"]) == (2.0, 5, "0123456789+")
    assert (row["ours_samples_per_s"], row["trl_tokens_per_s"]) == (8.0, sum(WORK.schedule()) / 2)
    assert "tiny-grpo-varied-fp32" in vs_trl.summary([row])


# -- chaos.py -------------------------------------------------------------------------------------------


def test_every_setting_and_kind_has_its_turn() -> None:
    plan = chaos.planned(list(SETTINGS.values()), list(KINDS.values()), 36, Random(0))
    assert len({(run.setting.name, run.kind.name) for run in plan}) == len({run.name for run in plan}) == 36
    assert all(run.setting.processes >= run.kind.processes for run in plan)
    for turns, choices in (
        (Counter(run.setting.name for run in plan), SETTINGS),
        (Counter(run.kind.name for run in plan), KINDS),
    ):
        assert set(turns) == set(choices)
        assert min(turns.values()) >= 2


def test_runs_differ_where_a_bit_does() -> None:
    zero, negative, nan = torch.zeros(2), -torch.zeros(2), torch.full((2,), torch.nan)
    assert records.same(nan, nan.clone())
    assert not records.same(zero, negative)
    assert not records.same(zero, zero.double())
    assert not records.same(1, 1.0)
    found = records.unequal({"a": 1, "b": 2, "c": zero}, {"a": 1, "b": 3, "d": 4})
    assert found == ["b is 3, not 2", "c is missing, not a tensor with sum 0", "d is 4, not missing"]
    assert records.unequal({str(n): n for n in range(9)}, {})[-1] == "and 6 more"


def test_gaps_and_doubles_in_metrics_are_seen(tmp_path: Path) -> None:
    def read(text: str) -> dict[str, str]:
        (tmp_path / "metrics.csv").write_text("iteration,train/x,perf/s\n" + text)
        return records.metrics(tmp_path / "metrics.csv")

    expected = read("0,,1\n1,5,1\n2,6,1\n")
    assert records.unequal(expected, read("0,,9\n1,5,8\n2,6,7\n")) == []
    for other in ("0,,1\n2,6,1\n", "0,,1\n1,5,1\n1,5,1\n2,6,1\n", "0,,1\n1,5,1\n2,6.0,1\n"):
        assert records.unequal(expected, read(other))


# -- every command --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quick:
    """A benchmark in a quick form."""

    words: tuple[str, ...] = ()  #: of the command line; ``OUT`` stands for an empty folder
    smaller: Mapping[str, Any] = field(
        default_factory=dict
    )  #: names in the module that get other values; OUT as well
    slow: bool = False


DONE = SimpleNamespace(returncode=0)
QUICK = {
    "chaos": Quick(
        ("--runs", "1", "--settings", "ppo", "--kinds", "while writing", "--iterations", "2", "--hits", "1",
         "--folder", "OUT/runs", "--out", "OUT/chaos.csv"),
        slow=True,
    ),
    "sweep_kills": Quick(
        ("--axes", "algo=ppo,rloo", "seed=0", "--iterations", "2", "--kills", "1", "--folder", "OUT/runs",
         "--out", "OUT/sweep_kills.csv"),
        slow=True,
    ),
    "estimator_variance": Quick(smaller={"WORLDS": range(1), "ESTIMATORS": estimator_variance.ESTIMATORS[:1]}),
    "faithfulness": Quick(("--out", "OUT/x.csv"), {"PROMPTS": 2, "GROUP": 2, "NEW_TOKENS": 8}),
    "gpu_wheels": Quick(
        ("--python", "3.12"),
        {"FOLDER": Path("OUT/wheels"), "subprocess": SimpleNamespace(run=lambda *_, **__: DONE)},
    ),
    "memory": Quick(
        ("--iterations", "1", "--out", "OUT/memory.csv", "rollout.prompts=2", "rollout.max_new_tokens=4",
         "validation.prompts=2"),
        slow=True,
    ),
    "plan": Quick(("--out", "OUT/plan.csv", "--replan")),
    "products": Quick(("--out", "OUT/products.csv"), {"SHAPES": [(4, 8, 16)]}),
    "rollout": Quick(
        ("--batch", "2", "--group-size", "2", "--prompt-tokens", "2", "--new-tokens", "3", "--runs", "1", "--threads",
         "1", "--out", "OUT/rollout.csv"),
        {"fastest": lambda work: (work(), 1.0)[1]},
    ),
    "scaling": Quick(
        ("--tiny", "--iterations", "2", "--out", "OUT"), {"AXES": {"prompts": scaling.AXES["prompts"]}}, slow=True
    ),
    "to_reward": Quick(
        ("--algo", "grpo", "--seeds", "0", "--iterations", "2", "--held-out", "4", "--target=-1", "--out",
         "OUT/to_reward.csv", "--trl-python", "OUT/stand_in"),
        slow=True,
    ),
    "vs_trl": Quick(
        ("--prompts", "2", "--group-size", "2", "--new-tokens", "4", "--runs", "1", "--out", "OUT/vs_trl.csv",
         "--trl-python", "OUT/stand_in"),
        slow=True,
    ),
    "where": Quick(
        ("--prompts", "1", "--out", "OUT/where.csv"),
        {"prepare": lambda _: None, "WARM": 0, "Work": lambda *kind: Work(*kind[:-3], 4, 4, "cpu")},
    ),
}  # fmt: skip
#: Run by test_gpu_rehearsal.py.
ELSEWHERE = {"gpu"}
COMMANDS = sorted(
    {p.stem for p in (ROOT / "benchmarks").glob("*.py") if "__main__" in p.read_text()} - ELSEWHERE
)
#: Replaces an interpreter with TRL: runs our side once more.
STAND_IN = f"""#!{sys.executable}
import sys
from pathlib import Path

from race import ours, ours_to_reward

described = ours.describe_environment
ours.describe_environment = lambda root: described(root) | {{"packages": described(root)["packages"] | {{"trl": ""}}}}
if sys.argv[2] == "race.theirs_to_reward":
    ours_to_reward.main(Path(sys.argv[-1]))
ours.main(ours.Work.from_json(sys.argv[-2]), Path(sys.argv[-1]))
"""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in QUICK and QUICK[n].slow else n for n in COMMANDS],
)
def test_every_benchmark_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in QUICK, f"benchmarks/{name}.py needs a quick form in QUICK"
    (tmp_path / "stand_in").write_text(STAND_IN)
    (tmp_path / "stand_in").chmod(0o755)
    plans = (ROOT / "benchmarks" / "results" / "plan.csv").read_text().splitlines(keepends=True)
    (tmp_path / "plan.csv").write_text("".join(plans[:2]))
    module = importlib.import_module(name)
    for constant, value in QUICK[name].smaller.items():
        if isinstance(value, Path):
            value = Path(str(value).replace("OUT", str(tmp_path)))
        monkeypatch.setattr(module, constant, value)
    words = [word.replace("OUT", str(tmp_path)) for word in QUICK[name].words]
    monkeypatch.setattr(sys, "argv", [name, *words])
    assert not module.main()
    for word in words:
        assert not word.endswith(".csv") or len(Path(word).read_text().splitlines()) > 1, word


@pytest.mark.slow
@pytest.mark.parametrize("algo", ["grpo", "ppo", "rloo"])
def test_both_sides_make_the_same_update(algo: str) -> None:
    pytest.importorskip("trl", reason="the other side of the race is not installed")
    words = [
        "--algo",
        algo,
        "--lengths",
        "varied",
        "--prompts",
        "2",
        "--group-size",
        "2",
        "--new-tokens",
        "4",
    ]
    assert vs_trl.main([*words, "--check"]) == 0


SHELL = sorted(
    [*(ROOT / "benchmarks").glob("*.sh"), *(ROOT / "scripts").glob("*.sbatch"), ROOT / ".ci" / "run"]
)


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_scripts_can_be_read(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)


@pytest.mark.parametrize(
    ("step", "code", "requeued"),
    [
        ("exit 7", 7, False),
        # told of the time limit: it saves, and asks to be run again
        ('trap \'echo "{\\"status\\": \\"interrupted\\"}" > status.json; exit 75\' USR1\n'
         "kill -USR1 $PPID; sleep 5 & wait", 75, True),
    ],
)  # fmt: skip
def test_the_job_of_slurm(tmp_path: Path, step: str, code: int, requeued: bool) -> None:
    for name, body in (("srun", f'echo "$@" > told\n{step}'), ("scontrol", 'echo "$@" > requeued')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "5", "RUN": "."}
    script = ROOT / "scripts" / "slurm.sbatch"
    done = subprocess.run(["bash", script, "algo=grpo"], cwd=tmp_path, env=environment, timeout=20)
    assert done.returncode == code
    assert (
        "python train.py hardware=slurm resume=auto hydra.run.dir=. algo=grpo"
        in (tmp_path / "told").read_text()
    )
    assert (tmp_path / "requeued").exists() is requeued
