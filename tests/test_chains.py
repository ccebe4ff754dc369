"""Chains of runs: the overrides that replace ``init=RUN``, what is refused, and the record of the parents."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from conftest import Compose, evaluated
from policylab.config.checks import check_init
from policylab.config.settle import settle
from policylab.errors import UserError
from policylab.report.evidence import descent
from policylab.report.groups import group_runs
from policylab.report.read import read_run
from policylab.runs.command import with_command_of
from policylab.runs.find import find_run
from policylab.runs.folder import point_latest, write_json
from policylab.runs.parents import ancestors, lineage, parents_of, with_parent, with_parent_of_sweep
from policylab.runs.saved_config import load_config
from policylab.runs.words import typed

TINY = {
    "_target_": "policylab.models.loading.embedded",
    "name": "tiny",
    "path": None,
    "dtype": "float32",
    "chat": None,
}


def make_parent(folder: Path, status: str = "done", model: dict[str, Any] = TINY, **more: Any) -> Path:
    """A folder with the files of a run and both policies."""
    for which, iteration in (("best", 15), ("final", 20)):
        (folder / "model" / which).mkdir(parents=True)
        write_json(folder / "model" / which / "policylab.json", {"iteration": iteration})
    config = {"model": model, "paths": {"run_name": "sft-tiny"}, "init": {"run": None, "which": "best"}}
    OmegaConf.save(OmegaConf.create(config), folder / "config.yaml")
    write_json(folder / "status.json", {"status": status, "iteration": 3, "iterations": 20, **more})
    write_json(folder / "env.json", {"overrides": []})
    return folder


def words_of(
    run: Path, which: str = "best", *more: str, model: str = "tiny", name: str = "tiny"
) -> list[str]:
    """The overrides that ``init=RUN`` stands for."""
    path = run / "model" / which
    return [
        f"init.run={run}",
        f"model={model}",
        f"model.path={path}",
        f"model.name={name}",
        "model.dtype=float32",
        *more,
    ]


# -- what it stands for -----------------------------------------------------------------------------------


def test_init_stands_for_the_policy_of_a_run(tmp_path):
    run = make_parent(tmp_path / "logs" / "reviews" / "sft-tiny" / "a")
    point_latest(run, tmp_path / "logs")
    for name in (str(run), str(run / "model" / "final"), "latest", "sft-tiny", "reviews/sft-tiny"):
        here = f"paths.logs={tmp_path}/logs"
        assert with_command_of(["algo=grpo", f"init={name}", here]) == ["algo=grpo", *words_of(run), here]
    chosen = with_command_of([f"init={run}", "init.which=final", "model.dtype=bfloat16"])
    assert chosen == [*words_of(run, "final")[:-1], "init.which=final", "model.dtype=bfloat16"]
    assert with_command_of(["init=null", "seed=1"]) == ["seed=1"]
    assert with_command_of(chosen) == chosen, (
        "once resolved, it stays: the job of a sweep runs these words again"
    )


def test_a_sweep_may_have_several_parents(tmp_path):
    """Each job replaces its own parent by overrides."""
    logs = tmp_path / "logs"
    a, b = make_parent(logs / "reviews" / "sft-tiny" / "a"), make_parent(tmp_path / "b c=1")
    words = with_command_of(["-m", typed(f"init=sft-tiny,{b}"), "seed=0,1", f"paths.logs={logs}"])
    assert words == ["-m", f'init={a},"{b}"', "seed=0,1", f"paths.logs={logs}"]
    values = OverridesParser.create().parse_override(words[1]).sweep_string_iterator()
    assert [with_parent([f"init={value}"], None)[0] for value in values] == [
        f"init.run={a}",
        f'init.run="{b}"',
    ]


def test_a_sweep_goes_on_with_the_parent_on_record(tmp_path):
    """By then `latest` is one of the sweep's own jobs."""
    parent, job = (make_parent(tmp_path / name) for name in ("parent", "job"))
    (tmp_path / "sweep.jsonl").write_text(json.dumps({"sweep": {"shared": words_of(parent)}}) + "\n")
    point_latest(job, tmp_path)
    assert with_parent_of_sweep(["init=latest", "seed=0"], tmp_path) == [f"init={parent}", "seed=0"]
    assert with_parent_of_sweep([f"init={job}"], tmp_path) == [f"init={job}"], (
        "a path is compared with it later"
    )
    assert with_parent_of_sweep(["seed=0"], tmp_path) == ["seed=0"]
    (tmp_path / "sweep.jsonl").write_text('{"sweep": {"sha')
    assert with_parent_of_sweep(["init=latest"], tmp_path) == ["init=latest"]


@pytest.mark.parametrize(
    ("model", "choice", "name", "more"),
    [
        (
            {"_target_": "policylab.models.scratch.from_scratch", "name": "tiny_scratch"},
            "hf",
            "tiny_scratch",
            [],
        ),
        ({**TINY, "_target_": "policylab.models.loading.from_hub", "name": "a/b"}, "hf", "a/b", []),
        ({**TINY, "name": "mine", "path": "/folder", "chat": False}, "hf", "mine", ["model.chat=false"]),
    ],
)
def test_any_model_is_taken_from_the_folder_that_the_run_exported(tmp_path, model, choice, name, more):
    run = make_parent(tmp_path / "run", model={"dtype": "float32", **model})
    assert with_command_of([f"init={run}"]) == words_of(run, "best", *more, model=choice, name=name)


def test_the_newest_run_of_an_experiment_is_taken(tmp_path):
    logs = tmp_path / "logs"
    for task, folder, started in (
        ("reviews", "b", "2026-01-01"),
        ("reviews", "a", "2026-01-03"),
        ("walks", "c", "2026-01-02"),
    ):
        make_parent(logs / task / "sft-tiny" / folder, started=started)
    (logs / "reviews" / "sft-tiny" / "notes").mkdir()
    newest = logs / "reviews" / "sft-tiny" / "a"
    assert find_run("sft-tiny", logs) == find_run(logs / "reviews" / "sft-tiny") == newest
    assert find_run("walks/sft-tiny", logs) == logs / "walks" / "sft-tiny" / "c"
    with pytest.raises(
        UserError, match=r"no run at .*ppo-tiny; give .*the name of an experiment in .*logs, or latest"
    ):
        find_run("ppo-tiny", logs)
    with pytest.raises(UserError, match="reviews is not a run folder"):
        find_run("reviews", logs)


def test_a_folder_of_any_name_is_reached(tmp_path):
    run = make_parent(tmp_path / "it's a b=1,[c]")
    words = with_command_of([typed(f"init={run}")])
    read = {o.key_or_group: o.value() for o in OverridesParser.create().parse_overrides(words)}
    assert (read["init.run"], read["model.path"]) == (str(run), f"{run}/model/best")


def test_the_config_says_where_it_starts(compose, tmp_path):
    run = make_parent(tmp_path / "run_of_before")
    config = settle(compose(with_command_of(["algo=grpo", "task=random_walks", f"init={run}"])))
    assert (config.init.run, config.model.path, config.model.name) == (str(run), f"{run}/model/best", "tiny")
    assert not config.model.trust_remote_code
    assert config.paths.run_name == "grpo-tiny"


# -- what it refuses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["init=RUN", "model=gpt2"],
            r"init=.* starts from the model of that run; leave out model=gpt2, or init",
        ),
        (["init=RUN", "model.path=/x"], r"leave out model\.path=/x, or init"),
        (["init=RUN", "resume=RUN"], r"init=.* is for a new run, and resume=.* give one of them"),
        (["init=RUN", "init.which=last"], r"init\.which=last is not one of best, final"),
        (["init=/nowhere"], "no run at /nowhere; give the folder of a run"),
        (["init=latest"], r"there is no .*latest; give the folder of a run"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, words, message):
    run = make_parent(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        with_command_of([*(word.replace("RUN", str(run)) for word in words), f"paths.logs={tmp_path}/logs"])


def test_a_run_that_did_not_finish_is_taken_only_if_the_command_says_which_policy(tmp_path):
    for status, said in (
        ("failed", r"failed \(ValueError: no\) after iteration 3 of 20"),
        ("interrupted", "was interrupted after iteration 3 of 20"),
        ("running", "was killed after iteration 3 of 20"),
    ):
        run = make_parent(tmp_path / status, status, exception="ValueError: no")
        with pytest.raises(
            UserError, match=rf"{status} {said}; finish it \(resume=.*init\.which=best\|final"
        ):
            with_command_of([f"init={run}"])
        assert words_of(run)[0] in with_command_of([f"init={run}", "init.which=best"])


def test_a_run_that_still_runs_or_has_no_policy_is_refused(tmp_path, monkeypatch):
    from policylab.runs import same_run

    run = make_parent(tmp_path / "run")
    shutil.rmtree(run / "model" / "best")
    with pytest.raises(UserError, match=r"no policy at .*model/best; this run has exported final"):
        with_command_of([f"init={run}"])
    monkeypatch.setattr(same_run, "running_process", lambda _: 17)
    with pytest.raises(UserError, match="is still running, as process 17; wait for its end"):
        with_command_of([f"init={run}", "init.which=final"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"init": "latest", "model": {}},
            r"init=latest works only on the command line: python train\.py init=RUN",
        ),
        (
            {"init": {"run": "/a", "which": "best"}, "model": {"path": None}},
            "init=/a works only on the command line",
        ),
        (
            {"init": {"run": "/a", "which": "best"}, "model": {"path": "/a/model/final"}},
            r"init\.run=/a starts from /a/model/best, and model\.path=/a/model/final; give init=/a without",
        ),
        (
            {"init": {"run": None, "which": "final"}, "model": {}},
            r"init\.which=final selects .* there is no init=",
        ),
    ],
)
def test_an_init_that_no_command_has_resolved_is_refused(config, message):
    with pytest.raises(UserError, match=message):
        check_init(OmegaConf.create(config))


def test_a_resumed_run_may_find_its_parent_elsewhere(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "parent")
    check_init(chained(tmp_path / "parent"))
    linked = {"model": {"path": f"{tmp_path}/link/model/best"}}
    check_init(OmegaConf.merge(chained(tmp_path / "parent"), linked))
    moved = {"model": {"path": "/moved"}, "resume": f"{tmp_path}/run"}
    check_init(OmegaConf.merge(chained(tmp_path / "parent"), moved))


def test_one_command_starts_a_chained_run_and_goes_on_with_it(tmp_path):
    """By then `latest` is the run itself."""
    logs = tmp_path / "logs"
    parent, other = (make_parent(logs / "reviews" / name / "a") for name in ("sft-tiny", "other"))
    point_latest(parent, logs)
    run, here = logs / "grpo", f"paths.logs={logs}"
    command = ["init=latest", "resume=auto", f"hydra.run.dir={run}", here]
    first = with_command_of(command)
    assert first == [*words_of(parent), f"hydra.run.dir={run}", here]
    make_parent(run, "running")
    config = load_config(run)
    config.init.run, config.model.path = str(parent), f"{parent}/model/best"
    OmegaConf.save(config, run / "config.yaml")
    write_json(run / "env.json", {"overrides": words_of(parent)})
    point_latest(run, logs)
    again = with_command_of(command)
    assert again == [
        *words_of(parent)[:2],
        *words_of(parent)[3:],
        f"++model.path={parent}/model/best",
        here,
        f"resume={run}",
    ]
    assert with_command_of([f"init={parent}", *command[1:]]) == again
    with pytest.raises(
        UserError, match=r"started from .*sft-tiny/a, and init=.*other/a; give another hydra\.run\.dir"
    ):
        with_command_of([f"init={other}", *command[1:]])


# -- on record ------------------------------------------------------------------------------------------------


def test_parents_of_parents_are_on_record(tmp_path):
    first, second, third = (make_parent(tmp_path / name) for name in ("first", "second", "third"))
    write_json(second / "env.json", {"parents": ancestors(chained(first), second, "f1")})
    found = ancestors(chained(second, "final"), third, "f2")
    assert found == [
        {"run": str(second), "name": "sft-tiny", "policy": "final", "iteration": 20, "weights": "f2"},
        {"run": str(first), "name": "sft-tiny", "policy": "best", "iteration": 15, "weights": "f1"},
    ]
    assert lineage(found) == (
        "sft-tiny/second (final policy, of iteration 20), which started from sft-tiny/first (best policy, of "
        "iteration 15)"
    )
    write_json(third / "env.json", {"parents": found})
    shutil.rmtree(first)
    shutil.rmtree(second)
    assert ancestors(chained(second, "final"), third, "f2") == found, "what is on record stays"
    assert ancestors(OmegaConf.create({"init": {"run": None}}), tmp_path, "f0") == []


def chained(parent: Path, which: str = "best") -> Any:
    return OmegaConf.create(
        {"init": {"run": str(parent), "which": which}, "model": {"path": f"{parent}/model/{which}"}}
    )


def test_the_report_names_parents_and_groups_seeds_by_them(tmp_path):
    from test_report import make_run

    folders = []
    for seed in (0, 1):
        run = make_run(tmp_path / f"grpo_{seed}", seed, 0.5, model__path=f"/logs/sft_s{seed}/model/best")
        parent = {"name": "sft-tiny", "policy": "best", "weights": "f"}
        old = {"run": "/logs/pre", "name": "pretrain", "policy": "final", "iteration": 9, "weights": "g"}
        write_json(
            run / "env.json",
            {"parents": [{**parent, "run": f"/logs/sft_s{seed}", "iteration": 4 + seed}, old]},
        )
        folders.append(run)
    groups = group_runs([read_run(run) for run in folders])
    assert [len(group.runs) for group in groups] == [2]
    older = ", which started from pretrain/pre (final policy, of iteration 9)"
    assert descent(groups) == (
        f"\nppo-tiny-reviews started from sft-tiny/sft_s0 (best policy, of iteration 4){older}; "
        f"sft-tiny/sft_s1 (best policy, of iteration 5){older}.\n"
    )


# -- whole chains -----------------------------------------------------------------------------------------------

GRPO = ["algo=grpo", "init.which=final", "optim.lr=1e-2", "validation.every=1"]
FAST = ["debug=fast", "hardware=cpu", "callbacks.console=null"]


@pytest.fixture
def train(compose: Compose, tmp_path: Path) -> Callable[..., Path]:
    """``train(["algo=ppo"], "name")`` trains in ``tmp_path / "run"``, renames that folder, and returns it."""
    rows = tmp_path / "rows.jsonl"
    row = {"prompt": "the film number", "completion": " is a good one"}
    rows.write_text("".join(json.dumps(row | {"prompt": f"the film number {n}"}) + "\n" for n in range(20)))

    def run(overrides: Sequence[str], name: str = "run") -> Path:
        from policylab.launch import run as job

        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        new = [*FAST, f"task.source={rows}", "task.held_out=8"]
        words = with_command_of([*(new if "resume=" not in str(overrides) else []), *overrides])
        job.train(settle(compose(words)), folder, words)
        return folder.rename(tmp_path / name)

    return run


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_a_chain_starts_where_its_parent_ended(train, tmp_path, caplog):
    """Supervised from random weights, then GRPO, then GRPO with adapters: equal to the bit, KL 0, all recorded."""
    from policylab.config.build import build_policy
    from policylab.models.fingerprint import fingerprint
    from policylab.runs.metrics_file import read_rows

    def start_of(run: Path) -> Any:
        """The policy of a run before its first iteration."""
        return build_policy(load_config(run), critic=None)

    caplog.set_level("INFO")
    sft = train(["algo=sft", "model=tiny_scratch", "optim.lr=1e-2"], "sft")
    (line,) = [line for line in caplog.text.splitlines() if "algo=grpo" in line]
    assert shlex.split(line)[:3] == ["python", "train.py", "algo=grpo"]
    assert line.endswith(f"init={tmp_path}/run")

    grpo = train([*GRPO, f"init={sft}"], "grpo")
    initial, final = start_of(grpo), weights_of(sft / "model" / "final")
    assert {
        name: value for name, value in initial.lm.state_dict().items() if name in final
    }.keys() == final.keys()
    assert all(torch.equal(initial.lm.state_dict()[name], value) for name, value in final.items())
    assert initial.tokenizer.get_vocab() == start_of(sft).tokenizer.get_vocab()
    first, *_, last = read_rows(grpo / "metrics.csv")
    assert first["val/kl"] == pytest.approx(0, abs=1e-5), "the reference is the parent's policy"
    assert abs(last["val/kl"]) > 1e-3
    (parent,) = parents_of(grpo)
    assert parent["weights"] == fingerprint(initial.loaded_parameters())
    assert (parent["run"], parent["iteration"]) == (str(sft), 2)
    assert load_config(grpo).paths.run_name == "grpo-tiny_scratch"

    lora = train([*GRPO, f"init={grpo}", "model/adapter=lora"], "lora")
    assert [Path(parent["run"]) for parent in parents_of(lora)] == [grpo, sft]
    assert read_rows(lora / "metrics.csv")[0]["val/kl"] == pytest.approx(0, abs=1e-5)
    result = evaluated(lora)
    assert result["metrics"]["val/kl"] == pytest.approx(
        read_rows(lora / "metrics.csv")[-1]["val/kl"], abs=1e-6
    )

    again = train([*GRPO, f"init={lora}", "model/adapter=lora"])
    merged, base = weights_of(lora / "model" / "final"), start_of(again).lm.state_dict()
    plain = {name.replace(".base_layer", ""): value for name, value in base.items()}
    assert all(torch.equal(plain[name], value) for name, value in merged.items()), (
        "the parent's adapter is merged"
    )
    assert read_rows(again / "metrics.csv")[0]["val/kl"] == pytest.approx(0, abs=1e-5)

    shutil.move(lora, tmp_path / "moved")
    with pytest.raises(UserError, match=r"model\.path=.*lora/model/final: there is no such folder"):
        train([f"resume={again}", "iterations=3"])
    train([f"resume={again}", "iterations=3", f"model.path={tmp_path}/moved/model/final"])
    assert len(parents_of(again)) == 3
    shutil.rmtree(tmp_path / "moved" / "model" / "final")
    shutil.copytree(grpo / "model" / "final", tmp_path / "moved" / "model" / "final")
    with pytest.raises(UserError, match="started from other weights than these"):
        train([f"resume={again}", "iterations=4"])
