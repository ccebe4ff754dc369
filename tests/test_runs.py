"""Runs from Python (`load_run`, `list_runs`) and on the console (``runs.py``)."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

import policylab
from conftest import composed
from doc_blocks import ROOT, blocks
from policylab.callbacks import tables
from policylab.cli.commands import as_overrides
from policylab.errors import UserError
from policylab.launch.runs import runs_job
from policylab.runs.folder import point_latest, write_json
from policylab.runs.places import ASSETS

HERE = platform.node()
#: Larger than any process id.
NO_PROCESS = 2**22 + 1


def make_run(
    folder: Path, after: float | None = 0.5, *, algo: str = "ppo", started: str = "2026-11-01", **status: Any
) -> Path:
    """A folder that looks like that of a run which was validated before training and after 20 iterations.

    Args:
        after: its last reward; None for a run that has no results.
        status: changes ``status.json``.
    """
    folder.mkdir(parents=True)
    config = {
        "seed": 0,
        "task": {"name": "reviews"},
        "algo": {"name": algo},
        "model": {
            "name": "tiny",
            "dtype": "float32",
            "attn_implementation": "sdpa",
            "trust_remote_code": True,
        },
        "callbacks": {"checkpoint": {"monitor": "val/reward", "mode": "max"}},
        "logger": {"wandb": {"api_key": "<secret>"}},
        "paths": {"run": str(folder)},
    }
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    ended = {"status": "done", "iteration": 20, "iterations": 20, "process": NO_PROCESS, "host": HERE}
    write_json(folder / "status.json", ended | {"started": f"{started}T00:00:00+00:00"} | status)
    if after is not None:
        (folder / "metrics.csv").write_text(
            f"iteration,val/reward,train/reward\n0,0.1,\n1,,0.2\n20,{after},0.4\n21,0."
        )
    return folder


def console(capsys: pytest.CaptureFixture[str], logs: Path, *words: str) -> str:
    """What ``python runs.py`` prints."""
    config = composed("runs", tuple(as_overrides(words)))
    config.paths.logs = str(logs)
    tables.console.cache_clear()  # a training in this process may have turned it off
    runs_job(config)
    return capsys.readouterr().out


# -- loading --------------------------------------------------------------------------------------------------


def test_a_run_is_loaded(tmp_path):
    folder = make_run(tmp_path / "reviews" / "ppo-tiny" / "a", wall_seconds=9.5)
    write_json(folder / "env.json", {"parents": [{"run": "/b", "name": "sft-tiny"}]})
    lines = [
        json.dumps({"iteration": i, "split": "val", "completion": "a\u2028b"}, ensure_ascii=False)
        for i in (0, 20)
    ]
    (folder / "samples.jsonl").write_text("\n".join([*lines, '{"iteration": 21, "comp']))
    point_latest(folder, tmp_path)
    for name in (folder, folder / "metrics.csv", "latest", "ppo-tiny", "reviews/ppo-tiny"):
        assert policylab.load_run(name, tmp_path).path == folder
    run = policylab.load_run(str(folder))
    assert (run.state, run.status["iteration"], run.named("algo")) == ("done", 20, "ppo")
    assert run.config.logger.wandb.api_key == "<secret>"
    assert run.parents[0]["name"] == "sft-tiny"
    assert run.rows[1:] == [
        {"iteration": 1, "train/reward": 0.2},
        {"iteration": 20, "val/reward": 0.5, "train/reward": 0.4},
    ]
    assert run.curves == {"val/reward": {0: 0.1, 20: 0.5}, "train/reward": {1: 0.2, 20: 0.4}}
    assert [sample["completion"] for sample in run.samples] == ["a\u2028b", "a\u2028b"]


def test_the_summary_of_a_run_that_goes_on_comes_from_its_metrics(tmp_path):
    """A resumed run keeps the file of its first session until it ends again."""
    run = policylab.Run(make_run(tmp_path / "a", wall_seconds=9.5))
    so_far = {
        "before": {"iteration": 0, "val/reward": 0.1},
        "after": {"iteration": 20, "val/reward": 0.5},
        "best": {"metric": "val/reward", "value": 0.5, "iteration": 20},
        "status": "done",
        "iterations": 20,
        "wall_seconds": 9.5,
    }
    assert run.summary == so_far
    write_json(run.path / "summary.json", {"status": "done", "iterations": 20, "tokens_trained": 7})
    assert run.summary["tokens_trained"] == 7
    write_json(run.path / "summary.json", {"status": "interrupted", "iterations": 10})
    assert run.summary == so_far


def test_metrics_are_a_dataframe(tmp_path, monkeypatch):
    run = policylab.Run(make_run(tmp_path / "a"))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pandas", None)
        with pytest.raises(UserError, match=r"pandas is not installed: pip install pandas; without it, rows"):
            _ = run.metrics
    pytest.importorskip("pandas")
    frame = run.metrics
    assert list(frame.index) == [0, 1, 20]
    assert frame["val/reward"].dropna().to_dict() == {0: 0.1, 20: 0.5}
    assert policylab.Run(make_run(tmp_path / "b", after=None)).metrics.empty


def test_what_cannot_be_loaded_is_refused(tmp_path, caplog):
    folder = make_run(tmp_path / "a", status="failed")
    with pytest.raises(UserError, match=rf"there is no {tmp_path}/latest; give the folder of a run"):
        policylab.load_run("latest", tmp_path)
    with pytest.raises(
        UserError, match=r"no run at .*/b; give the folder of a run, the name of an experiment in /"
    ):
        policylab.load_run("b")
    (tmp_path / "refused").mkdir()
    (tmp_path / "refused" / "train.log").touch()
    with pytest.raises(
        UserError, match=r"refused is not a run folder: it has no config.yaml with a status.json"
    ):
        policylab.load_run(tmp_path / "refused")
    with pytest.raises(UserError, match=r"which='last' is not one of best, final"):
        policylab.load_run(folder, which="last")
    with pytest.raises(UserError, match=r"no policy at .*/a/model/best; this run has exported none"):
        _ = policylab.load_run(folder).policy
    assert not caplog.records


def test_a_running_run_is_loaded_with_a_warning(tmp_path, caplog):
    folder = make_run(
        tmp_path / "a", status="running", process=os.getppid(), updated="2999-01-01T00:00:00+00:00"
    )
    run = policylab.load_run(folder)
    assert run.state == "running"
    assert f"{folder} is still running, at iteration 20 of 20: its records and" in caplog.text
    for state, status in {
        "killed": {"process": NO_PROCESS},
        "running": {"process": NO_PROCESS, "host": "elsewhere"},
    }.items():
        write_json(folder / "status.json", {**run.status, **status})
        assert run.state == state


def around() -> list[Any]:
    """All that a notebook would not want to be changed."""
    root = logging.getLogger()
    environment = {k: v for k, v in os.environ.items() if k != "TORCHINDUCTOR_CACHE_DIR"}  # torch's import
    ours = {name: logging.getLogger(name).level for name in ("policylab", "lightning")}
    return [
        *(root.level, list(root.handlers), ours, os.getcwd(), list(sys.path), environment),
        *(torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()),
        *(torch.get_rng_state().tolist(), torch.are_deterministic_algorithms_enabled()),
        *(GlobalHydra.instance().hydra, OmegaConf.has_resolver("repo"), signal_handlers()),
    ]


def signal_handlers() -> list[Any]:
    import signal

    return [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]


def test_a_policy_is_loaded_and_nothing_else_changes(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "model").mkdir()
    (folder / "model" / "final").symlink_to(ASSETS / "tiny")
    before = around()
    run = policylab.load_run(folder, which="final")
    policy, tokenizer = run.policy, run.tokenizer
    assert around() == before
    assert run.policy is policy
    assert not policy.training
    tokens = tokenizer("the film", return_tensors="pt")["input_ids"]
    assert policy.lm(tokens).logits.shape[:2] == tokens.shape


def test_code_of_a_policy_runs_only_if_this_call_allows_it(tmp_path):
    """The config of the run says trust_remote_code: true."""
    folder = make_run(tmp_path / "a")
    model = folder / "model" / "best"
    model.mkdir(parents=True)
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    write_json(model / "config.json", {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}})
    with pytest.raises(UserError, match="trust_remote_code=true"):
        _ = policylab.load_run(folder).policy
    assert not (tmp_path / "ran").exists()


def test_records_are_read_without_torch(tmp_path):
    make_run(tmp_path / "logs" / "reviews" / "ppo-tiny" / "a")
    code = (
        "import sys, policylab; (run,) = policylab.list_runs(); policylab.load_run('ppo-tiny').rows; run.summary; "
        "print(sorted({'torch', 'hydra', 'pandas', 'lightning'} & set(sys.modules)), 'load_run' in dir(policylab))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("['hydra'] True\n", "")
    with pytest.raises(AttributeError, match="'policylab' has no attribute 'lode_run'"):
        _ = policylab.lode_run


# -- listing --------------------------------------------------------------------------------------------------


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    """Three runs, one of them in a sweep, and the link to the oldest."""
    old = make_run(tmp_path / "reviews" / "ppo-tiny" / "old", 0.3, started="2026-10-01")
    make_run(tmp_path / "multirun" / "now" / "rloo_s0", 0.7, algo="rloo", started="2026-10-03")
    make_run(tmp_path / "reviews" / "ppo-tiny" / "new", None, started="2026-10-02", status="failed")
    make_run(old / "checkpoints" / "no_run_of_its_own")
    point_latest(old, tmp_path)
    return tmp_path


def test_runs_are_listed_the_newest_first(logs, caplog):
    def names(**only: Any) -> list[str]:
        return [run.path.name for run in policylab.list_runs(logs, **only)]

    assert names() == ["rloo_s0", "new", "old"]
    assert names(algo="ppo") == names(algo=["ppo", "grpo"], task="reviews") == ["new", "old"]
    assert names(state=("failed", "killed")) == ["new"]
    assert names(model="gpt2") == []
    with pytest.raises(
        UserError, match="state=finished is not one of running, done, failed, interrupted, killed"
    ):
        names(state="finished")
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        policylab.list_runs(logs / "nowhere")
    assert not caplog.records
    (logs / "reviews" / "ppo-tiny" / "new" / "config.yaml").write_text("a: [")
    assert names() == ["rloo_s0", "old"]
    assert "new is left out: ParserError: while parsing" in caplog.text


def test_the_console_lists_them(logs, capsys):
    text = console(capsys, logs)
    assert [line.split()[-1].split("/")[-1] for line in text.splitlines()] == [
        "folder",
        "rloo_s0",
        "new",
        "old",
    ]
    age = r"\d+ d"
    assert re.fullmatch(
        rf"done +reviews +ppo +tiny +0 +0\.1 -> 0\.3 +20/20 +{age}  reviews/ppo-tiny/old",
        text.splitlines()[-1],
    )
    ranked = console(capsys, logs, "sort=reward").splitlines()
    assert [line.split("/")[-1] for line in ranked[1:]] == ["rloo_s0", "old", "new"]
    assert len(console(capsys, logs, "algo=rloo,grpo", "state=done").splitlines()) == 2
    (logs / "none").mkdir()
    assert console(capsys, logs / "none").startswith("no run in")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["algo=pop"], r"no run in .* has algo=pop; there are algo=ppo,rloo"),
        (["sort=rewards"], r"sort=rewards is not a column; choose from state, task"),
        (["lst"], r"lst is not a command of runs.py; choose from list, compare, clean"),
        (["latest", "latest"], r"latest is not a command"),
        (["list", "latest"], r"list takes no runs; it takes task, algo, model, state, sort"),
        (["compare", "latest"], r"compare takes two runs, and was given 1: python runs.py compare A B"),
        (["compare", "latest", "latest", "sort=age"], r"compare takes no sort; it takes runs"),
        (["clean", "algo=ppo"], r"clean takes no algo; it takes remove"),
        (["clean", "remove=yes"], r"remove=yes is neither true nor false"),
    ],
)
def test_what_the_console_refuses(logs, capsys, words, message):
    with pytest.raises(UserError, match=message):
        console(capsys, logs, *words)


def test_arguments_become_overrides(tmp_path, monkeypatch):
    assert as_overrides(["compare", "latest", "a b", "paths.logs=x"]) == [
        *("command=compare", 'runs=["latest","a b"]', "paths.logs=x")
    ]
    assert as_overrides(["state=done", "clean", "--cfg", "job"]) == [
        *("command=clean", "only.state=done", "--cfg", "job")
    ]
    monkeypatch.chdir(tmp_path)
    Path("lr=1").mkdir()
    assert as_overrides(["compare", "lr=1", "algo=ppo,rloo"]) == [
        *("command=compare", 'runs=["lr=1"]', 'only.algo="ppo,rloo"')
    ]


def test_two_runs_are_compared(logs, capsys):
    text = console(capsys, logs, "compare", "latest", "now")
    legend, settings, numbers = (part.splitlines() for part in text.split("\n\n"))
    assert [line.split()[0] for line in legend] == ["A", "B"]
    assert [line.split() for line in settings] == [["config", "A", "B"], ["algo.name", "ppo", "rloo"]]
    assert ["val/reward", "0.3", "0.7", "+0.4"] in [line.split() for line in numbers]
    assert "no setting differs" in console(capsys, logs, "compare", "latest", "latest")


# -- clean ----------------------------------------------------------------------------------------------------


def start(folder: Path, files: Sequence[str] = ("train.log",), age: float = 7200) -> Path:
    """A folder that a command has left, so many seconds ago."""
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).write_text("12345")
    for path in (*folder.iterdir(), folder):
        then = path.stat().st_mtime - age
        os.utime(path, (then, then))
    return folder


def test_clean_shows_and_removes_what_never_began(logs, capsys):
    dated = logs / "reviews" / "rloo-tiny" / "2026-10-01_00-00-00_s0"
    start(dated)
    start(dated.with_name(f"{dated.name}_2"), ())
    start(logs / "multirun" / "now" / "ppo_s1")
    (logs / "multirun" / "now" / "sweep.jsonl").touch()
    text = console(capsys, logs, "clean")
    assert re.search(r"would remove .*2026-10-01_00-00-00_s0_2 \(empty; 0 bytes\)\n", text)
    assert re.search(r"would remove .*2026-10-01_00-00-00_s0 \(refused; 5 bytes\)\n", text)
    assert re.search(r"would remove .*/new \(failed at its start; \d+ bytes\)\n", text)
    total = re.search(r"4 folders, \d+ bytes", text)
    assert total
    assert text.endswith(f"{total[0]}: remove=true removes them\n")
    assert dated.is_dir()
    assert console(capsys, logs, "clean", "remove=true").endswith(f"removed {total[0]}\n")
    assert {path.name for path in logs.rglob("*") if path.is_dir() and not path.is_symlink()} == {
        *("reviews", "ppo-tiny", "old", "checkpoints", "no_run_of_its_own", "multirun", "now", "rloo_s0")
    }
    assert console(capsys, logs, "clean").startswith("nothing to remove in ")


def test_clean_keeps_all_others(tmp_path, capsys):
    made = [
        make_run(tmp_path / "alive", None, status="running", process=os.getpid()),
        make_run(tmp_path / "elsewhere", None, status="running", host="elsewhere"),
        make_run(tmp_path / "done", None),
        make_run(tmp_path / "resumable", None, status="interrupted"),
        make_run(tmp_path / "evaluated", None, status="failed"),
        make_run(tmp_path / "linked", None, status="failed"),
        start(tmp_path / "notes"),  # no name of a run
        start(tmp_path / "2026-10-01_00-00-00_s0", age=60),  # may be starting
        start(tmp_path / "2026-10-01_00-00-00_s1", ("train.log", "my_notes.txt")),
        start(tmp_path / "2026-10-01_00-00-00_s2"),  # its job runs
        start(tmp_path / ".trash" / "2026-10-01_00-00-00_s3"),
    ]
    (made[3] / "checkpoints").mkdir()
    (made[3] / "checkpoints" / "last.ckpt").touch()
    (made[4] / "evaluate.json").touch()
    point_latest(made[5], tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with (made[9] / "train.log").open("rb") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert console(capsys, tmp_path, "clean", "remove=true").startswith("nothing to remove")
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError, match=r"there is no folder .*nowhere"):
        console(capsys, tmp_path / "nowhere", "clean")


# -- the command and the documentation ------------------------------------------------------------------------


def test_the_script_prints_and_refuses(logs):
    def script(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "runs.py"), f"paths.logs={logs}", *words]
        return subprocess.run(command, cwd=logs, capture_output=True, text=True)

    done = script("algo=rloo")
    assert (done.returncode, done.stderr) == (0, "")
    assert "multirun/now/rloo_s0" in done.stdout
    refused = script("algo=pop")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.startswith("error: no run in ")


def test_the_examples_of_the_documentation_run(logs, monkeypatch, capsys):
    monkeypatch.chdir(logs.parent)
    if not (logs.parent / "logs").exists():
        (logs.parent / "logs").symlink_to(logs)
    model = logs / "reviews" / "ppo-tiny" / "old" / "model"
    model.mkdir()
    (model / "best").symlink_to(ASSETS / "tiny")
    found = blocks([ROOT / "docs" / "runs.md"])
    (python,) = [block.text for block in found if "policylab.load_run" in block.text]
    namespace: dict[str, Any] = {}
    exec(re.sub(r"^.*# needs pandas.*\n", "", python, flags=re.MULTILINE), namespace)
    capsys.readouterr()
    commands = [words[2:] for block in found for words in block.commands if words[1:2] == ["runs.py"]]
    assert {words[0] for words in commands if words} >= {"compare", "clean"}
    for words in commands:
        assert console(capsys, logs, *words)
