"""Root scripts, run folder, messages, resume, signals."""

from __future__ import annotations

import copy
import json
import logging
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

from conftest import evaluated, generated
from policylab.cli.entry import check_one_choice, flags_first
from policylab.cli.messages import improve, new_keyword
from policylab.cli.screen import Screen
from policylab.config import resolvers
from policylab.config.settle import settle
from policylab.config.suggest import nearest
from policylab.errors import UserError
from policylab.models.folder import check_folder
from policylab.runs.command import NothingLeft, with_command_of
from policylab.runs.environment import describe_environment
from policylab.runs.find import checkpoint_to_resume, find_checkpoint, find_run
from policylab.runs.folder import check_link, claim, point_latest, write_atomically, write_json
from policylab.runs.metrics_file import read_rows
from policylab.runs.places import with_places
from policylab.runs.redaction import HIDDEN
from policylab.runs.resume import rewind
from policylab.runs.same_run import check_nothing_done, check_own_folder, check_same_values
from policylab.runs.saved_config import ADDED, check_folder_is_free, load_config, plain
from policylab.runs.status import RunStatus, finish_status, read_status, running_process
from policylab.runs.token_records import read_records, recorded, write_records
from policylab.runs.words import command, read, typed
from policylab.runs.words import override as overriding
from policylab.runs.writing import write_state
from small_runs import quick

ROOT = Path(__file__).parent.parent


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=120)


def make_run(folder: Path, **config: object) -> Path:
    """A folder with the files of a run."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config or {"seed": 0})))
    (folder / "status.json").write_text('{"status": "done"}')
    return folder


# -- the folder -----------------------------------------------------------------------------------------


def test_jobs_of_the_same_second_never_share_a_folder(tmp_path):
    with ThreadPoolExecutor(16) as pool:
        claimed = list(pool.map(claim, [tmp_path / "logs" / "a" / "run"] * 32))
    assert len(set(claimed)) == 32
    assert {path.name for path in claimed} == {"run", *(f"run_{i}" for i in range(2, 33))}


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the run folder .*hydra\.run\.dir"):
        claim(tmp_path / "file" / "run")


def test_run_dir_resolves_to_the_same_folder_again(tmp_path):
    resolvers.run_dir.cache_clear()
    first = resolvers.run_dir(None, str(tmp_path / "run"))
    assert resolvers.run_dir(None, str(tmp_path / "run")) == first
    resolvers.run_dir.cache_clear()
    assert resolvers.run_dir(None, str(tmp_path / "run")) == f"{first}_2"


def test_run_dir_is_absolute(tmp_path, monkeypatch):
    """In a multirun Hydra appends a relative path to the multirun's folder, which the path already contains."""
    monkeypatch.chdir(tmp_path)
    resolvers.run_dir.cache_clear()
    assert resolvers.run_dir(None, "out/run") == str(tmp_path / "out" / "run")


def test_run_dir_of_a_resumed_run_is_its_own(tmp_path):
    run = make_run(tmp_path / "run")
    assert resolvers.run_dir(str(run), str(tmp_path / "new")) == str(run)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("text", "name"),
    [("org/model", "org__model"), ("a b:c", "a_b_c"), ("//", "unnamed"), ("..", "unnamed"), (".x.", "x")],
)
def test_slug(text, name):
    assert resolvers.slug(text) == name


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "a\\b", ""])
def test_a_name_that_is_a_path_is_refused(name):
    assert resolvers.run_name("my run", "ppo", "tiny") == "my_run"
    with pytest.raises(
        UserError, match=r"is not a folder name; for another folder write hydra\.run\.dir=PATH"
    ):
        resolvers.run_name(name, "ppo", "org/model")


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def crash(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, "new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.json", "old")]


def test_latest_points_at_the_newest_run(tmp_path):
    for name in ("a", "b"):
        run = make_run(tmp_path / "logs" / name)
        point_latest(run, tmp_path / "logs")
        assert (tmp_path / "logs" / "latest").resolve() == run
    assert not os.readlink(tmp_path / "logs" / "latest").startswith("/")


def test_what_is_in_the_way_of_the_link_is_told(tmp_path):
    check_link(tmp_path / "latest")
    point_latest(make_run(tmp_path / "run"), tmp_path)
    check_link(tmp_path / "latest")
    (tmp_path / "logs" / "latest").mkdir(parents=True)
    with pytest.raises(UserError, match=r"logs/latest is used as a link .*; move it away"):
        check_link(tmp_path / "logs" / "latest")


def test_a_taken_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="already holds a run"):
        check_folder_is_free(make_run(tmp_path / "run"))


# -- finding a run --------------------------------------------------------------------------------------


def test_a_run_is_found_by_any_path_inside(tmp_path):
    run = make_run(tmp_path / "run")
    checkpoint = run / "checkpoints" / "last.ckpt"
    write_state({"policylab": {}}, checkpoint)
    assert find_run(run) == find_run(checkpoint) == run
    assert find_checkpoint(run, "last") == checkpoint_to_resume(str(run)) == checkpoint
    assert checkpoint_to_resume(str(checkpoint)) == checkpoint
    with pytest.raises(UserError, match=r"no checkpoint at .*best\.ckpt; this run has last"):
        find_checkpoint(run, "best")


def test_wrong_runs_are_told(tmp_path):
    with pytest.raises(UserError, match="no run at"):
        find_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not a run folder"):
        find_run(tmp_path)


# -- what is saved --------------------------------------------------------------------------------------


def test_the_saved_config_is_plain_and_resolved(compose):
    config = plain(compose())
    assert config["paths"]["run"].endswith("/run")
    assert "${" not in json.dumps(config)


def test_environment_tells_versions_and_commit():
    environment = describe_environment(ROOT)
    assert {"python", "packages", "platform", "cpu", "gpus", "git", "command"} <= set(environment)
    assert {"torch", "lightning", "transformers"} <= set(environment["packages"])
    assert set(environment["git"]) == {"commit", "dirty"}


# -- status ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "state"), [(None, "done"), (ValueError("boom"), "failed"), (KeyboardInterrupt(), "interrupted")]
)
def test_status_tells_how_a_run_ended(tmp_path, error, state):
    try:
        with RunStatus(tmp_path, iterations=3, max_tokens=None) as status:
            assert read_status(tmp_path)["status"] == "running"
            status.write(iteration=2)
            if error:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    content = read_status(tmp_path)
    assert (content["status"], content["iteration"], content["iterations"]) == (state, 2, 3)
    assert content["exception"] == ("ValueError: boom" if state == "failed" else None)
    assert content["finished"]


def test_a_run_that_still_runs_is_known_by_its_process(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        write_json(
            tmp_path / "status.json", {"status": "running", "host": platform.node(), "process": other.pid}
        )
        assert running_process(tmp_path) == other.pid
        words = read_status(tmp_path)
        write_json(tmp_path / "status.json", words | {"updated": "2020-01-01T00:00:00+00:00"})
        assert running_process(tmp_path) is None, "another program has this process id now"
        write_json(tmp_path / "status.json", words | {"updated": datetime.now(UTC).isoformat()})
        assert running_process(tmp_path) == other.pid
        other.stdin.write(b"\n")
        other.stdin.flush()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert running_process(tmp_path) is None, "the process has ended without a new status"
        other.communicate()
    assert running_process(tmp_path) is None, "killed: its last status is 'running', but the process is gone"


def test_seconds_of_a_resumed_run_add_up(tmp_path):
    (tmp_path / "status.json").write_text('{"wall_seconds": 100.0, "iteration": 7, "started": "then"}')
    with RunStatus(tmp_path, iterations=9, max_tokens=None):
        pass
    content = read_status(tmp_path)
    assert content["wall_seconds"] >= 100
    assert (content["iteration"], content["started"]) == (7, "then")


# -- messages -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("lr", "optim.lr"),
        ("rollout.temprature", "rollout.temperature"),
        ("optim.learning_rate", "optim.lr"),
        ("optim.epsilon", "optim.eps"),
        ("optimm", "optim"),
        ("reward.words", None),
        ("xyz", None),
    ],
)
def test_suggestions(word, meant):
    known = [
        "optim",
        "optim._target_",
        "optim.lr",
        "optim.eps",
        "seed",
        "rollout.temperature",
        "reward.workers",
    ]
    assert nearest(word, known) == (f"did you mean {meant}? " if meant else "")


def test_arguments_of_a_users_class_are_suggested():
    config = OmegaConf.create({"reward": {"_target_": f"{__name__}.make_run", "workers": 0}, "seed": 0})
    assert (
        new_keyword(config, "reward.folder")
        == f"to give it to {__name__}.make_run, write +reward.folder=...; "
    )
    assert new_keyword(config, "reward.words") == new_keyword(config, "words") == ""
    del config.reward["workers"]
    for key in ("reward.workers", "reward/pool"):
        assert new_keyword(config, key) == f"the file of this reward leaves it out: write +{key}=...; "


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("algo/ppoo", "algo=ppoo does not exist; did you mean ppo? choose from: a2c, cispo"),
        ("algo/", "algo= has no value; choose from: a2c"),
        ("algo/kl/in_los", "algo/kl=in_los does not exist; did you mean in_loss? choose from: in_loss"),
        (
            "model//a/b/c",
            "model=/a/b/c does not exist; write model=hf model.path=/a/b/c model.name=NAME; choose from",
        ),
        (
            "model/org/name",
            "model=org/name does not exist; write model=hf model.name=org/name; choose from: gpt2",
        ),
        ("task/rows.jsonl", "task=rows.jsonl does not exist; write task.source=rows.jsonl; choose from"),
        ("reward/my.words", "reward=my.words does not exist; write reward._target_=my.words; choose from"),
    ],
)
def test_a_choice_that_does_not_exist_is_told_with_those_that_do(path, message):
    told = improve(
        f"In 'train': Could not find '{path}'\n\nConfig search path:\n\tpath=file://{ROOT / 'configs'}"
    )
    assert told.startswith(message)


def test_hydra_messages_fit_one_line():
    assert (
        improve("Missing mandatory value: run\n    full_key: run\n    object_type=dict")
        == "run must be given: run=..."
    )
    assert "\n" not in improve("one\ntwo\n    full_key: x")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.py", "optim.lrr=1"], "optim.lrr is not in the config; did you mean optim.lr?"),
        (["train.py", "seed=["], "cannot read 'seed=['"),
        (["generate.py", "run=/nowhere", "prompt=it's [a, test"], "no run at /nowhere"),
        *(
            pytest.param(
                words, message, marks=pytest.mark.slow
            )  # each is a start; the messages are tested above
            for words, message in [
                (["train.py", "algo=ppoo"], "algo=ppoo does not exist; did you mean ppo?"),
                (["train.py", "experiments=nothing"], "experiments=nothing does not exist"),
                (["train.py", "model=hf"], "model.name must be given"),
                (["train.py", "algo/critic=reward_model"], "algo.critic.init must be given"),
                (["train.py", "resume=/nowhere"], "no run at /nowhere"),
                (["evaluate.py"], "run must be given"),
                (["evaluate.py", "run=/nowhere"], "no run at /nowhere"),
            ]
        ),
    ],
)
def test_bad_input_is_one_line_and_code_2(words, message):
    done = script(*words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_refused_command_leaves_no_folder(tmp_path):
    done = script("train.py", "iterations=0", f"paths.logs={tmp_path}")
    assert (done.returncode, done.stderr) == (2, "error: iterations is 0; it must be at least 1\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "text",
    ["it's [so] good", 'a "quote" b', "back\\slash", "end\\", "a, b=c {d} ${e} $f", '\\"x', "null", "3", ""],
)
def test_free_text_needs_no_quotes(text):
    override = OverridesParser.create().parse_override(typed(f"prompt={text}", ["prompt"]))
    assert OmegaConf.create({"prompt": override.value()}).prompt == text


def test_other_arguments_are_unchanged():
    assert typed("algo=ppo", ["prompt"]) == "algo=ppo"
    assert typed("debug=nan") == 'debug="nan"', "a name, not a number"
    assert flags_first(["algo=ppo", "-m", "seed=0,1"]) == ["-m", "algo=ppo", "seed=0,1"]


def test_one_choice_a_group():
    check_one_choice(
        ["logger=[csv,wandb]", "tags=[a,b]", "model=tiny", "reward=[sentiment]"], ROOT / "configs"
    )
    for word in ("reward=[sentiment,optimality]", "algo/kl=[none,in_loss]"):
        with pytest.raises(UserError, match=r"only the last of several choices for .* would count; take one"):
            check_one_choice([word], ROOT / "configs")


def test_a_home_folder_is_found_where_no_shell_looks():
    assert typed("model.path=~/nowhere") == f"model.path={Path.home()}/nowhere"
    assert typed("runs=[~/a,~/b]") == f"runs=[{Path.home()}/a,{Path.home()}/b]"
    assert typed("~algo_model") == "~algo_model"


def test_a_model_is_a_folder(tmp_path):
    (tmp_path / "table.csv").write_text("")
    with pytest.raises(
        UserError, match=r"model.path=.*table\.csv is a file; give the folder that holds config\.json"
    ):
        check_folder(tmp_path / "table.csv")


# -- help -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", quick(["train", "evaluate", "generate"], ["train"]))
def test_help_says_everything(name):
    done = script(f"{name}.py", "--help")
    assert done.returncode == 0
    for key in OmegaConf.load(ROOT / "configs" / f"{name}.yaml"):
        assert key in ("defaults", "hydra") or f"{key}:" in done.stdout


def test_help_imports_nothing_heavy():
    code = (
        "import runpy, sys; sys.argv = ['train.py', '--help']; runpy.run_path('train.py', run_name='__main__');"
        "heavy = {'torch', 'lightning', 'transformers', 'wandb'} & set(sys.modules); assert not heavy, heavy"
    )
    done = script("-c", code)
    assert done.returncode == 0, done.stderr
    for group in ("algo", "model", "task", "reward", "experiments"):
        assert f"\n  {group} " in done.stdout


# -- resume ---------------------------------------------------------------------------------------------


def test_a_resumed_run_repeats_its_command(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "env.json").write_text(
        json.dumps({"overrides": ["algo=reinforce", "seed=3", "+x.y=1", "iterations=10"]})
    )
    assert with_command_of([f"resume={run}", "iterations=20", "x.y=2"]) == [
        "algo=reinforce",
        "seed=3",
        f"resume={run}",
        "iterations=20",
        "x.y=2",
    ]
    assert with_command_of(["algo=ppo"]) == ["algo=ppo"]


def test_a_group_chosen_at_a_resume_replaces_the_values_set_in_it(tmp_path):
    run = make_run(tmp_path / "run")
    before = ["hardware.devices=2", "reward._target_=my.r", "algo/kl=none", "algo.kl.x=1", "seed=3"]
    (run / "env.json").write_text(json.dumps({"overrides": before}))
    now = ["hardware=cpu", "reward=sentiment", "algo/kl=in_loss", f"resume={run}"]
    assert with_command_of(now) == ["seed=3", *now]


def test_paths_mean_what_they_meant_at_the_start(tmp_path):
    """Not what a link or a relative path means now; any folder name works."""
    reward = {"path": "/judge", "key": "${oc.env:A_KEY}"}
    run = make_run(
        tmp_path / "a b=1,[c]", model={"path": "/first"}, task={"source": "default"}, reward=reward
    )
    words = [
        "model.path=logs/latest/model/final",
        "task.source=default",
        "+reward.path=logs/latest/model/final",
    ]
    write_json(run / "env.json", {"overrides": words})
    resume = f'resume="{run}"'
    places = ["++model.path=/first", "++reward.path=/judge"]
    assert with_command_of([f"resume={run}"]) == ["task.source=default", *places, resume]
    (tmp_path / "link").symlink_to(run)
    assert with_command_of([f"resume={tmp_path / 'link'}", "model.path=x"])[-2:] == [resume, "model.path=x"]


def test_files_of_a_reward_are_resolved_at_the_start(tmp_path, monkeypatch):
    (tmp_path / "judge").mkdir()
    (tmp_path / "latest").symlink_to("judge")
    monkeypatch.setenv("A_KEY", f"{tmp_path}/latest")
    reward = {"path": f"{tmp_path}/latest", "other": "a/b", "key": "${oc.env:A_KEY}"}
    found = with_places(OmegaConf.create({"reward": reward})).reward
    assert OmegaConf.to_container(found) == {**reward, "path": f"{tmp_path}/judge"}
    monkeypatch.chdir(tmp_path)
    Path("words").mkdir()
    Path("words/a.txt").touch()
    part = {"path": "words/a.txt", "more": ["words/a.txt"], "key": "${oc.env:A_KEY}", "ask": "0/1? " * 1000}
    found = with_places(OmegaConf.create({"reward": {"parts": {"a": part}}})).reward.parts.a
    place = str(tmp_path / "words" / "a.txt")
    assert OmegaConf.to_container(found) == {**part, "path": place, "more": [place]}
    run = make_run(tmp_path / "run", reward={"parts": {"a": OmegaConf.to_container(found)}})
    write_json(run / "env.json", {"overrides": ["reward=mine"]})
    assert f"++reward.parts.a.path={place}" in with_command_of([f"resume={run}"])


def test_one_command_starts_a_run_resumes_it_and_finds_it_finished(tmp_path):
    run = tmp_path / "run"
    command = ["algo=ppo", "iterations=10", f"hydra.run.dir={run}", "resume=auto"]
    with pytest.raises(UserError, match=r"resume=auto needs hydra\.run\.dir=FOLDER"):
        with_command_of(["resume=auto"])
    assert with_command_of(command) == command[:3]
    make_run(run)
    write_json(run / "env.json", {"overrides": []})
    status = {"iteration": 10, "iterations": 10, "max_tokens": None}
    write_json(run / "status.json", {**status, "status": "running"})
    assert with_command_of(command) == ["algo=ppo", "iterations=10", f"resume={run}"]
    write_json(run / "status.json", {**status, "status": "done"})
    with pytest.raises(NothingLeft, match="is done: 10 of 10 iterations"):
        with_command_of(command)
    longer = ["algo=ppo", "iterations=20", *command[2:]]
    assert with_command_of(longer) == ["algo=ppo", "iterations=20", f"resume={run}"]


def test_a_run_whose_command_is_not_known_in_full_is_not_repeated(tmp_path):
    run = tmp_path / "run"
    make_run(run)
    with pytest.raises(UserError, match=r"has no env\.json"):
        with_command_of([f"resume={run}"])
    write_json(run / "env.json", {"overrides": ["seed=1", f"+reward.api_key={HIDDEN}"]})
    with pytest.raises(UserError, match=r"reward\.api_key was given as plain text.* give it again"):
        with_command_of([f"resume={run}"])
    given = [f"resume={run}", "+reward.api_key=x"]
    assert with_command_of(given) == ["seed=1", *given]


def test_only_a_status_of_this_session_is_corrected(tmp_path):
    def after(content):
        write_json(tmp_path / "status.json", {"host": "elsewhere", "process": 1, **content})
        finish_status(tmp_path, "2026-01-01T00:00:10+00:00", "failed", "why")
        return read_status(tmp_path)["status"]

    assert after({"status": "running", "updated": "2026-01-01T00:00:11+00:00"}) == "failed"
    assert after({"status": "running", "updated": "2026-01-01T00:00:09+00:00"}) == "running"
    assert after({"status": "done", "updated": "2026-01-01T00:00:11+00:00"}) == "done"


def test_records_after_the_checkpoint_are_dropped(tmp_path):
    metrics, samples = tmp_path / "metrics.csv", tmp_path / "samples.jsonl"
    train, val = (f'{{"iteration": 2, "split": "{split}"}}\n' for split in ("train", "val"))
    metrics.write_text("iteration,val/x,x\n0,9,\n1,,1\n2,8,2\n3,,3\n")
    samples.write_text(train + val + train.replace("2", "3") + '{"iterat')
    for iteration in (1, 2, 3):
        write_records(tmp_path, iteration, [{"tokens": [iteration]}])
    rewind(tmp_path, 2, validates=False)
    assert {i: read_records(path) for i, path in recorded(tmp_path).items()} == {
        1: [{"tokens": [1]}],
        2: [{"tokens": [2]}],
    }
    assert metrics.read_text() == "iteration,val/x,x\n0,9,\n1,,1\n2,8,2\n"
    assert samples.read_text() == train + val
    rewind(tmp_path, 2, validates=True)
    assert metrics.read_text() == "iteration,val/x,x\n0,9,\n1,,1\n2,,2\n"
    assert samples.read_text() == train
    rewind(tmp_path, 0, validates=True)
    assert metrics.read_text() == "iteration\n"
    assert samples.read_text() == ""
    assert recorded(tmp_path) == {}


def test_another_run_cannot_be_resumed(tmp_path):
    run = make_run(
        tmp_path / "run",
        algo={"name": "ppo"},
        model={"name": "tiny"},
        task={"name": "reviews"},
        seed=0,
        resume="x",
    )
    with pytest.raises(
        UserError, match=r"resume=x continues in the folder of that run; leave out hydra\.run\.dir"
    ):
        check_own_folder(tmp_path / "elsewhere", run / "checkpoints" / "last.ckpt", "x")
    with pytest.raises(
        UserError, match=r"has seed=0, the command says 1; a resume may change .* start a new run"
    ):
        check_same_values({"seed": 0}, {"seed": 1})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "reward._target_",
            "my.reward",
            "=policylab.rewards.sentiment.sentiment, the command says my.reward;",
        ),
        ("reward.words", 3, "=None, the command says 3;"),
        (
            "task",
            {"name": "random_walks"},
            r".name=reviews, the command says random_walks \(and \d+ more values\)",
        ),
        ("task.held_out", 100, "=512, the command says 100;"),
        ("algo.kl.controller.initial", 1, "=0.05, the command says 1;"),
        ("model.adapter", {"rank": 2}, ".rank=None, the command says 2;"),
        ("model.dtype", "bfloat16", "=float32, the command says bfloat16;"),
        ("rollout.prompts", 8, "=32, the command says 8;"),
        ("hardware.precision", "bf16-mixed", "=32-true, the command says bf16-mixed;"),
        ("validation.prompts", 8, "=256, the command says 8;"),
        ("callbacks.checkpoint.monitor", "val/kl", "=val/reward, the command says val/kl;"),
    ],
)
def test_settings_that_would_make_another_run_are_refused_at_a_resume(compose, key, value, message):
    config = compose([])
    before = plain(config)
    with open_dict(config):
        OmegaConf.update(config, key, value, merge=False)
    with pytest.raises(UserError, match=f"this run has {key}{message}"):
        check_same_values(before, plain(config))


def test_a_run_older_than_a_key_is_resumed_and_evaluated_unchanged(compose, tmp_path):
    """Newer keys get the value of the older behaviour; any other missing key is named."""
    before = OmegaConf.create(plain(compose([])))
    for key in ADDED:
        group, _, name = key.rpartition(".")
        del (OmegaConf.select(before, group) if group else before)[name]
    before.optim._target_ = "policylab.modules.optimizer.AdamW"
    OmegaConf.save(before, tmp_path / "config.yaml")
    loaded = load_config(tmp_path)
    assert loaded.optim._target_ == compose([]).optim._target_
    assert {key: OmegaConf.select(loaded, key) for key in ADDED} == ADDED
    check_same_values(OmegaConf.to_container(loaded), plain(compose(["hardware=cpu"])))


def test_a_key_that_an_older_run_lacks_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "evaluate.py")])
    told = improve("Missing key every\n    full_key: validation.every\n    object_type=dict")
    assert told == "the run is older than validation.every: add it to its config.yaml (a new run has 5 there)"


def test_other_settings_may_change_at_a_resume(compose):
    changed = [
        *("iterations=9", "max_tokens=99", "name=x", "tags=[x]", "hardware=ddp_cpu", "callbacks=none"),
        *(
            "logger=[csv,tensorboard]",
            "validation.every=2",
            "optim.lr=1",
            "reward.workers=2",
            "task.data_dir=x",
        ),
        *("model.path=x", "task.source=x.jsonl"),  # whose contents are compared
    ]
    check_same_values(plain(compose([])), plain(compose(changed)))


@pytest.mark.parametrize(("start", "told"), [(12, True), (0, True), (None, False)])
def test_the_header_says_where_a_run_goes_on(compose, tmp_path, capsys, start, told):
    Screen(compose(["model=tiny_scratch"]), tmp_path / "run").opening([], start)
    assert (f"resume  from iteration {start} of {tmp_path / 'run'}\n" in capsys.readouterr().out) == told


@pytest.mark.parametrize(("task", "offered"), [("reviews", True), ("guess_number", False)])
def test_the_ending_offers_generate_only_without_an_environment(compose, tmp_path, capsys, task, offered):
    parts = SimpleNamespace(needs=SimpleNamespace(learns_from="rewards"))
    experiment = SimpleNamespace(module=SimpleNamespace(parts=parts))
    summary = {"status": "done", "before": {}, "after": {}, "best": None, "iterations": 1}
    times = {"wall_seconds": 1.0, "tokens_sampled": 1}
    Screen(compose([f"task={task}"]), tmp_path / "run").ending(experiment, summary | times)
    out = capsys.readouterr().out
    assert ("python generate.py" in out, "python evaluate.py" in out) == (offered, True)


# -- whole runs, in this process ------------------------------------------------------------------------

SMALL = ["debug=fast", "model=tiny_scratch", "hardware=cpu", "callbacks.console=null"]


@pytest.fixture
def train(compose, tmp_path):
    """``train(["iterations=4"])`` trains in ``tmp_path / "run"`` and returns that folder."""

    def run(overrides: list[str], stop_at: int | None = None) -> Path:
        from policylab.launch import run as job

        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        if stop_at is not None:
            overrides = [
                *overrides,
                f"+callbacks.stop._target_={__name__}.SignalAt",
                f"+callbacks.stop.at={stop_at}",
            ]
        words = (
            with_command_of([*SMALL, *overrides])
            if "resume" not in str(overrides)
            else with_command_of(overrides)
        )
        job.train(settle(compose(words)), folder, words)
        return folder

    return run


def SignalAt(at: int):
    """A callback that sends this process SIGINT at the start of an iteration."""
    from lightning import Callback

    class Signal(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if pl_module.iteration == at:
                os.kill(os.getpid(), signal.SIGINT)

    return Signal()


def test_a_run_leaves_all_its_files(train, caplog, tmp_path):
    caplog.set_level(logging.INFO)
    run = train([])
    assert not [said for said in caplog.messages if "weights_only" in said]
    for name in (
        "config.yaml",
        "env.json",
        "status.json",
        "metrics.csv",
        "samples.jsonl",
        "summary.json",
        "report.html",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "model/best/model.safetensors",
        "model/final/tokenizer.json",
    ):
        assert (run / name).is_file(), name
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["iterations"] == 2
    assert summary["before"]["iteration"] == 0
    assert summary["after"]["iteration"] == 2
    assert summary["best"]["metric"] == "val/reward"
    assert summary["tokens_sampled"] > 0
    assert summary["tokens_trained"] > 0
    assert not list(run.rglob(".*")), "nothing half-written stays behind"
    assert (tmp_path / "logs" / "latest").resolve() == run
    said = "\n".join(caplog.messages)
    # a command is one line, however long
    for line in ("PolicyLab", "sequences    ", "val/reward", f"resume={run} iterations=4"):
        assert line in said, "what the console would have shown, in the log"


def test_ctrl_c_saves_and_the_run_can_be_resumed(train, tmp_path):
    from policylab.distributed.signals import Interrupted

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        train(["iterations=2", "callbacks.checkpoint.every=100"], stop_at=0)
    assert stopped.value.exit_code == 130
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    run = tmp_path / "run"
    assert (
        read_status(run)["status"]
        == json.loads((run / "summary.json").read_text())["status"]
        == "interrupted"
    )
    assert read_status(run)["iteration"] == 1

    train([f"resume={run}", "~callbacks.stop"])
    assert [row["iteration"] for row in read_rows(run / "metrics.csv")] == [0, 1, 2]
    assert all("val/reward" in row for row in read_rows(run / "metrics.csv")), (
        "also that of the interrupted one"
    )
    assert read_status(run)["status"] == "done"
    with pytest.raises(UserError, match="has done 2 iterations, and iterations=2; give iterations=N above 2"):
        train([f"resume={run}"])


@pytest.mark.slow
def test_a_resumed_run_equals_one_that_went_through(train, tmp_path):
    """Bit for bit, whether it was stopped between two checkpoints, or had finished and is extended."""

    def state(run: Path) -> dict[str, torch.Tensor]:
        return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]

    # The adaptive coefficient is state as well: short horizon, so that every iteration moves it.
    adaptive = ["algo/kl=in_reward_adaptive", "algo.kl.controller.horizon=20"]
    options = ["validation.every=2", "callbacks.checkpoint.every=1", "optim.lr=1e-3", *adaptive]
    through = train([*options, "iterations=5"]).rename(tmp_path / "through")
    run = train([*options, "iterations=2"])
    train([f"resume={run}", "iterations=5"])
    expected, resumed = state(through), state(run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    columns = [{k for k in row if not k.startswith("perf/")} for row in read_rows(through / "metrics.csv")]
    rows = [
        [{k: row[k] for k in names} for row, names in zip(read_rows(r / "metrics.csv"), columns, strict=True)]
        for r in (through, run)
    ]
    assert rows[0] == rows[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "length",
    [["iterations=2"], ["iterations=9", "max_tokens=1"]],
)
def test_a_run_killed_after_its_last_iteration_is_finished(train, length):
    """Only its validation, summary and models are missing."""
    run = train(["validation.every=2", *length])
    results = ("summary.json", "model/final/model.safetensors")
    expected = read_rows(run / "metrics.csv")
    for name in results:
        (run / name).unlink()
    write_json(run / "status.json", read_status(run) | {"status": "running"})
    train([f"resume={run}"])
    assert all((run / name).is_file() for name in results)
    assert read_rows(run / "metrics.csv") == expected, "nothing was trained again"
    assert read_status(run)["status"] == "done"


@pytest.mark.slow
def test_the_validation_of_an_earlier_end_stays(train):
    """Also if the session that was to extend the run failed."""
    run = train(["iterations=1", "validation.every=2"])
    (_, end) = read_rows(run / "metrics.csv")
    write_json(run / "status.json", read_status(run) | {"status": "running"})
    train([f"resume={run}", "iterations=2"])
    assert "val/reward" in end
    assert read_rows(run / "metrics.csv")[1] == end


@pytest.mark.slow
def test_a_token_budget_ends_a_run_and_a_larger_one_prolongs_it(train):
    options = ["iterations=50", "validation.every=3", "callbacks.checkpoint.every=100"]
    run = train([*options, "max_tokens=1"])
    (row,) = read_rows(run / "metrics.csv")[1:]  # after the baseline: the iteration that spent the budget
    tokens = int(row["train/tokens"])
    assert "val/reward" in row, "validated at its end, whatever the interval"
    assert (run / "model" / "final" / "config.json").is_file()
    status, summary = read_status(run), json.loads((run / "summary.json").read_text())
    assert status["status"] == summary["status"] == "done"
    assert (status["iteration"], summary["iterations"], summary["after"]["iteration"]) == (1, 1, 1)
    assert status["tokens_sampled"] == summary["tokens_sampled"] == tokens, "validation is not counted"
    assert summary["tokens_trained"] > 0

    with pytest.raises(UserError, match=rf"has sampled {tokens} of max_tokens={tokens} tokens; give max_to"):
        train([f"resume={run}", f"max_tokens={tokens}"])
    train([f"resume={run}", f"max_tokens={3 * tokens}"])
    rows = read_rows(run / "metrics.csv")
    assert [row["iteration"] for row in rows] == list(range(len(rows)))
    assert rows[-2]["train/tokens"] < 3 * tokens <= rows[-1]["train/tokens"]
    assert read_status(run)["max_tokens"] == 3 * tokens
    assert "val/reward" in rows[-1]


def test_a_command_that_is_refused_while_it_is_built_leaves_nothing(train, tmp_path):
    with pytest.raises(UserError, match="cannot be imported"):
        train(["reward._target_=policylab.rewards.nothing"])
    assert list((tmp_path / "run").iterdir()) == []


def test_metrics_csv_cannot_be_switched_off(train):
    with pytest.raises(UserError, match="leave it on"):
        train(["logger.csv=null"])


def test_a_failure_is_on_record(train, tmp_path):
    with pytest.raises(UserError, match=r"is not measured; choose from: .*val/reward"):
        train(["callbacks.checkpoint.monitor=val/nothing"])
    status = read_status(tmp_path / "run")
    assert status["status"] == "failed"
    assert "val/nothing" in status["exception"]
    assert not (tmp_path / "logs" / "latest").exists(), "there is nothing in it to evaluate"


def test_processes_that_do_not_meet_are_on_record(train, tmp_path, monkeypatch, caplog):
    """A new run can be resumed, and an older run keeps its status."""

    def connect(*_):
        raise RuntimeError("no such interface")

    monkeypatch.setattr("policylab.launch.run.connect", connect)
    with pytest.raises(RuntimeError, match="no such interface"):
        train([])
    run = tmp_path / "run"
    status = read_status(run)
    assert (status["status"], status["exception"]) == ("failed", "RuntimeError: no such interface")
    assert checkpoint_to_resume(str(run)) is None
    assert "the run failed" in caplog.text
    with pytest.raises(RuntimeError, match="no such interface"):
        train([])
    assert read_status(run) == status


@pytest.mark.slow
@pytest.mark.parametrize("debug", ["overfit", "profile", "'nan'"])
def test_debug_presets_run(train, debug):
    run = train([f"debug={debug}", "iterations=4" if debug == "profile" else "iterations=1", *QUICK])
    assert read_status(run)["status"] == "done"
    assert (run / "profile" / "operators.txt").is_file() == (debug == "profile")


QUICK = ["rollout.prompts=4", "rollout.group_size=2", "rollout.max_new_tokens=4", "validation.prompts=4"]


def test_evaluate_and_generate_read_a_run(train, compose, tmp_path):
    from policylab.launch.evaluate import evaluate_job

    run = train([])
    result = evaluated(run)
    after = json.loads((run / "summary.json").read_text())["after"]
    assert result["iteration"] == 2
    assert result["metrics"]["val/reward"] == pytest.approx(after["val/reward"], abs=1e-6), (
        "the run's own validation"
    )
    assert len(result["samples"]) == 8
    words = [f"run={run}", "checkpoint=best", "prompts=5", "seed=1", "show=1"]
    evaluate_job(compose(words, config_name="evaluate"))
    assert len(json.loads((run / "evaluate.json").read_text())["samples"]) == 5
    assert "written to" in (run / "evaluate.log").read_text(), "what the console has shown"

    notes, foreign = tmp_path / "notes.txt", tmp_path / "foreign.ckpt"
    notes.write_text("no checkpoint")
    torch.save({"state_dict": {}}, foreign)
    state = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    state["state_dict"] = {name: value[:1] for name, value in state["state_dict"].items()}
    torch.save(state, tmp_path / "other.ckpt")
    for file, message in {
        notes: r"the checkpoint .*notes.txt is damaged \(13 bytes; .*\); take another one",
        foreign: r"foreign.ckpt was not written by policylab",
        tmp_path / "other.ckpt": r"is of another model than this one: .* take a checkpoint of this run",
    }.items():
        with pytest.raises(UserError, match=message):
            evaluated(run, checkpoint=file)

    texts = generated(run, "n=3", "max_new_tokens=5")
    assert len(texts) == 3
    assert texts == generated(run, "n=3", "max_new_tokens=5"), "the same seed, the same text"
    with pytest.raises(UserError, match="this run has exported best, final"):
        generated(run, policy="start")


@pytest.mark.parametrize(
    ("script", "word", "message"),
    [
        ("generate", "n=1.5", "n=1.5 is not a whole number"),
        ("generate", "n=0", "n is 0; it must be at least 1"),
        ("generate", "temperature=hot", "temperature='hot' is not a number"),
        ("generate", "temperature=-1", "temperature is -1; it must be at least 0"),
        ("generate", "max_new_tokens=2.5", "max_new_tokens=2.5 is not a whole number"),
        ("generate", "seed=x", "seed='x' is not a whole number"),
        ("evaluate", "prompts=0", "prompts is 0; it must be at least 1"),
        ("evaluate", "show=-1", "show is -1; it must be at least 0"),
        ("evaluate", "seed=1.5", "seed=1.5 is not a whole number"),
        ("evaluate", "n=0", "n is 0; it must be at least 1"),
        ("evaluate", "threshold=high", "threshold='high' is not a number"),
        (
            "evaluate",
            "trust_remote_code=yes please",
            "trust_remote_code=yes please is neither true nor false",
        ),
    ],
)
def test_values_of_evaluate_and_generate_are_checked(compose, script, word, message):
    from policylab.launch import evaluate, generate

    config = compose(["run=x", word], config_name=script)
    check = {"evaluate": lambda config: evaluate.check(config, []), "generate": generate.check}[script]
    with pytest.raises(UserError, match=message):
        check(config)


def test_a_place_where_an_evaluation_cannot_be_written_is_refused_at_once(tmp_path):
    from policylab.launch.asked import output_file

    with pytest.raises(UserError, match=r"there is no folder .*nosuch; create it first"):
        output_file(f"{tmp_path}/nosuch/out.json")
    with pytest.raises(UserError, match="is a folder; give the file to write"):
        output_file(str(tmp_path))
    with pytest.raises(UserError, match=r"x\.log is the name of a log; .*give FILE\.json"):
        output_file(f"{tmp_path}/x.log")
    assert list(tmp_path.iterdir()) == []


def test_results_replace_earlier_ones_alone(tmp_path):
    from policylab.launch.asked import output_file

    run, out = make_run(tmp_path / "run"), tmp_path / "out.json"
    (tmp_path / "image.json").write_bytes(b"\xff")
    for file in (run / "status.json", run / "config.yaml", run / "summary.json", tmp_path / "image.json"):
        with pytest.raises(UserError, match=f"out={file} is no file of results; give the name of a new one"):
            output_file(str(file))
    for results in ({"run": "", "metrics": {}}, [{"run": "", "completions": []}]):
        write_json(out, results)
        assert output_file(str(out)) == out
    assert output_file(str(tmp_path / "summary.json")) == tmp_path / "summary.json"


def test_an_evaluation_leaves_the_log_of_the_run_alone(tmp_path, compose, monkeypatch):
    from policylab.launch import evaluate

    run = make_run(tmp_path / "run")
    (run / "train.log").write_text("trained")
    for name, fails in (("find_checkpoint", None), ("evaluate", UserError("no"))):

        def stand_in(*_, error=fails):
            if error:
                raise error

        monkeypatch.setattr(evaluate, name, stand_in)
    config = compose([f"run={run}", f"out={run}/train.json"], "evaluate")
    for _ in range(2):
        with pytest.raises(UserError, match="no"):
            evaluate.evaluate_job(config)
    assert (run / "train.log").read_text() == "trained"
    assert len((run / "evaluate.log").read_text().splitlines()) == 2


@pytest.mark.slow
def test_settings_given_at_a_resume_take_effect(train):
    """The optimizer's state contains the old settings, but those of the command are used."""
    run = train(["iterations=2", "callbacks.checkpoint.every=1"])
    train([f"resume={run}", "iterations=3", "optim.lr=1e-6", "optim.weight_decay=0.01"])
    optimizer = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["optimizer_states"][0]
    assert {group["lr"] for group in optimizer["param_groups"]} == {1e-6}
    assert max(group["weight_decay"] for group in optimizer["param_groups"]) == 0.01
    assert read_rows(run / "metrics.csv")[-1]["train/lr"] == 1e-6


@pytest.mark.slow
def test_a_run_keeps_its_weights_and_data_if_their_paths_change(train, tiny, tmp_path, monkeypatch):
    """Links and relative paths are resolved at the start; later the contents are compared."""

    def save(weights: float, name: str) -> None:
        lm = copy.deepcopy(tiny.lm)
        lm.get_input_embeddings().weight.data *= weights
        lm.save_pretrained(tmp_path / name)
        tiny.tokenizer.save_pretrained(tmp_path / name)

    def text(row: int, word: str) -> str:
        return json.dumps({"prompt": f"the film number {row}", "reference": word}) + "\n"

    monkeypatch.chdir(tmp_path)
    save(1.0, "first")
    save(1.5, "second")
    latest, rows = tmp_path / "latest", tmp_path / "rows.jsonl"
    latest.symlink_to("first")
    rows.write_text("".join(text(row, "good") for row in range(20)))
    data = ["task.source=rows.jsonl", "task.held_out=8"]
    run = train(["model=tiny", "model.path=latest", *data, "optim.lr=1e-2", "iterations=1", "name=x"])
    config = load_config(run)
    assert (config.model.path, config.task.source) == (str(tmp_path / "first"), str(rows))
    latest.unlink()
    latest.symlink_to("second")
    monkeypatch.chdir(run)

    def measured() -> float:
        return evaluated(run)["metrics"]["val/kl"]

    assert measured() == pytest.approx(read_rows(run / "metrics.csv")[-1]["val/kl"], abs=1e-6) != 0
    train([f"resume={run}", "iterations=2"])
    assert measured() == pytest.approx(read_rows(run / "metrics.csv")[-1]["val/kl"], abs=1e-6)

    records = {name: (run / name).read_text() for name in ("config.yaml", "env.json", "metrics.csv")}
    (tmp_path / "rows.jsonl").write_text(
        "".join(text(row, "bad" if row == 7 else "good") for row in range(20))
    )
    for goes_on in (measured, lambda: train([f"resume={run}", "iterations=3"])):
        with pytest.raises(
            UserError, match="a run on other data than task reviews has now; restore the data"
        ):
            goes_on()
    rows.write_text("".join(text(row, "good") for row in range(20)))
    save(1.5, "first")
    for goes_on in (measured, lambda: train([f"resume={run}", "iterations=3"])):
        with pytest.raises(UserError, match=r"started from other weights than these \(folder .*first\)"):
            goes_on()
    assert records == {name: (run / name).read_text() for name in records}


def test_numbers_tuned_for_other_weights_are_told(compose, tmp_path):
    from policylab.config.checks import tuned_for_others

    foreign = compose([f"model.path={tmp_path}"])
    told = tuned_for_others(foreign, "ppo_tiny")
    assert re.match(r"optim\.lr=\S+ was tuned for the weights that come with", told)
    assert tuned_for_others(compose([]), "ppo_tiny") is None
    assert tuned_for_others(compose([f"model.path={tmp_path}", "optim.lr=1e-4"]), "ppo_tiny") is None
    assert tuned_for_others(foreign, "ppo_hf") is None


@pytest.mark.slow
def test_a_refused_resume_leaves_the_records_alone(train):
    run = train(["iterations=2", "callbacks.checkpoint.every=1"])
    records = {name: (run / name).read_text() for name in ("config.yaml", "env.json", "metrics.csv")}
    for override, message in {
        "optim.lr=fast": "is not a number",
        "model.architecture.n_layer=1": "this run has model.architecture.n_layer=4, the command says 1",
        "optim.frozen_layers=1": r"last.ckpt trained \d+ weights, the command \d+; give the model",
    }.items():
        with pytest.raises(UserError, match=message):
            train([f"resume={run}", "iterations=3", override])
        assert records == {name: (run / name).read_text() for name in records}
    train([f"resume={run}", "iterations=3"])


def test_a_run_whose_states_are_lost_is_not_started_over(tmp_path):
    run = make_run(tmp_path / "run", algo={}, model={}, task={})
    with pytest.raises(
        UserError, match=r"has done 0 iterations, but checkpoints/last\.ckpt and previous\.ckpt are"
    ):
        check_nothing_done(run)
    write_json(run / "status.json", {"status": "running"})
    check_nothing_done(run)
    (run / "metrics.csv").write_text("iteration,x\n0,1\n3,2\n")
    with pytest.raises(UserError, match="has done 3 iterations, but"):
        check_nothing_done(run)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / ".last.ckpt").touch()  # killed while it wrote the first
    check_nothing_done(run)


# -- commands that are printed, paths that are typed ------------------------------------------------------

ODD = ("a b=1,[c]", "it's", 'say "x"', "${e}", "7", "null", "back\\", "x: {y}", "å/é")


@pytest.mark.parametrize("name", ODD)
def test_printed_commands_reach_a_folder_of_any_name(name, tmp_path, monkeypatch):
    """Through a shell, the root script and Hydra."""
    words = shlex.split(command("evaluate.py", overriding("run", name)))
    assert words[:2] == ["python", "evaluate.py"]
    assert OmegaConf.create({"x": read(typed(words[2]))}).x == name
    run = make_run(tmp_path / name)
    assert OmegaConf.create({"x": read(typed(f"run={run}"))}).x == str(run)
    write_json(run / "env.json", {"overrides": ["seed=1"]})
    before, resume = with_command_of([typed(shlex.split(command("train.py", overriding("resume", run)))[2])])
    assert (before, find_run(OmegaConf.create({"x": read(resume)}).x)) == ("seed=1", run)


def test_a_path_that_exists_is_taken_literally(tmp_path):
    (tmp_path / "a,b").mkdir()
    assert read(typed(f"model.path={tmp_path}/a,b")) == f"{tmp_path}/a,b"
    assert typed("seed=0,1") == "seed=0,1"
    assert typed("resume=null") == "resume=null"
    assert read(typed("paths.logs=~/x")) == str(Path.home() / "x")
    assert typed("hydra.run.dir=${paths.logs}/x") == "hydra.run.dir=${paths.logs}/x"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_utf8_shows_the_characters_that_it_has(encoding):
    code = (
        "from policylab.cli.entry import prepare; prepare('train.py');"
        "from policylab.callbacks.tables import config_tree, console, before_after;"
        "console().print('\\N{GRINNING FACE} \\u2500'); console().print(config_tree({'a': {'b': '\\u4e2d'}}, []));"
        "console().print(before_after({'val/x': 1.0}, {'val/x': 2.0}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0, done.stderr
    assert "\\U0001f600" in done.stdout.decode(encoding)
