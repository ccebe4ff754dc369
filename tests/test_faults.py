"""Faults during a run: damaged files, numbers that are not finite, full disks, lost loggers."""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from omegaconf import DictConfig

from kills import records
from policylab.callbacks import checkpoint as checkpoint_callback
from policylab.callbacks import metrics_csv, samples
from policylab.callbacks.checkpoint import Checkpoint, write_policy
from policylab.callbacks.loggers import tolerated
from policylab.callbacks.metrics_csv import MetricsCSV
from policylab.callbacks.samples import Samples
from policylab.cli.logs import LogFile
from policylab.data.rollout import Completion
from policylab.errors import RunError, UserError
from policylab.rewards.scorer import Scorer
from policylab.runs import checkpoints, retry, writing
from policylab.runs import damage as damages
from policylab.runs.checkpoints import become_newest, checkpoint_iteration, newest_whole_checkpoint
from policylab.runs.damage import damage, read
from policylab.runs.find import checkpoint_to_resume
from policylab.runs.folder import append_whole
from policylab.runs.metrics_file import read_rows
from policylab.runs.resume import rewind
from policylab.runs.writing import write_state
from small_runs import algo, levels, quick, quiet, small


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def state(iteration: int, weight: float = 0.0) -> dict[str, Any]:
    """A checkpoint with the entries that its readers use."""
    numbers = {"iteration": iteration, "tokens_sampled": 0}
    return {"policylab": numbers, "state_dict": {"w": torch.full((300,), weight or float(iteration))}}


def experiment(folder: Path, algorithm: DictConfig, task: str = "random_walks", **changes: Any) -> Any:
    """A small run that saves metrics and checkpoints in each iteration, without preflight and validation."""
    from policylab.config.build import build

    parts = {
        "callbacks.checkpoint": {
            "_target_": "policylab.callbacks.checkpoint.Checkpoint",
            "run_dir": str(folder),
            "every": 1,
            "monitor": "val/reward",
            "mode": "max",
            "export": False,
        },
        "logger.csv": {"_target_": "policylab.callbacks.metrics_csv.MetricsCSV", "run_dir": str(folder)},
    }
    with quiet():
        built = build(small(algorithm, parts | changes, task), folder)
    built.trainer.limit_val_batches = 0
    built.module._checked = True
    if algorithm.name != "sft" and task == "random_walks":
        built.module.sampler.scorer.reward = levels
    return built


def fit(built: Any, checkpoint: Path | None = None) -> Any:
    with quiet():
        built.trainer.fit(built.module, datamodule=built.data, ckpt_path=checkpoint, weights_only=True)
    return built.module


def weights(module: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.policy.parameters()])


# -- damaged checkpoints ------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run folder with the states of iterations 1 and 2; the best is that of 1."""
    (tmp_path / "config.yaml").write_text("seed: 0")
    (tmp_path / "status.json").write_text("{}")
    for iteration in (1, 2):
        write_state(state(iteration), tmp_path / "checkpoints" / "last.ckpt")
    write_state(state(1), tmp_path / "checkpoints" / "best.ckpt")
    return tmp_path


def files(run: Path) -> dict[str, int]:
    """Iteration of each checkpoint."""
    return {path.stem: checkpoint_iteration(path) for path in (run / "checkpoints").glob("*.ckpt")}


def test_the_last_state_but_one_is_kept(run_folder):
    assert files(run_folder) == {"last": 2, "previous": 1, "best": 1}
    assert newest_whole_checkpoint(run_folder) == run_folder / "checkpoints" / "last.ckpt"
    assert newest_whole_checkpoint(run_folder / "checkpoints") is None, "a run that has saved none yet"


def cut(content: bytearray) -> bytearray:
    return content[:-1]


def emptied(content: bytearray) -> bytearray:
    return bytearray()


def zeroed(content: bytearray) -> bytearray:
    """Zeroes a file, as if its blocks had not reached the disk."""
    return bytearray(len(content))


def flipped(content: bytearray) -> bytearray:
    """Flips a bit of a weight."""
    content[content.index(torch.full((1,), 2.0).numpy().tobytes() * 20) + 100] ^= 4
    return content


@pytest.mark.parametrize("harm", [cut, emptied, zeroed, flipped])
def test_a_damaged_file_falls_back_to_the_one_before(run_folder, harm, caplog):
    last = run_folder / "checkpoints" / "last.ckpt"
    last.write_bytes(harm(bytearray(last.read_bytes())))
    assert (
        newest_whole_checkpoint(run_folder)
        == checkpoint_to_resume(str(run_folder))
        == last.with_stem("previous")
    )
    assert "last.ckpt is damaged" in caplog.messages[0]
    assert "resuming from" in caplog.messages[0]
    assert "\n" not in caplog.messages[0]
    with pytest.raises(UserError, match=r"last\.ckpt is damaged .* take another one"):
        checkpoint_to_resume(str(last))
    last.with_stem("previous").write_bytes(b"")
    with pytest.raises(UserError, match=r"last\.ckpt is damaged.*previous\.ckpt is damaged"):
        newest_whole_checkpoint(run_folder)


def test_a_missing_file_is_told(run_folder, caplog):
    last = run_folder / "checkpoints" / "last.ckpt"
    last.unlink()
    assert newest_whole_checkpoint(run_folder) == last.with_stem("previous")
    assert "last.ckpt is missing; resuming from" in caplog.messages[0]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        OSError(errno.ESTALE, "Stale file handle"),
        RuntimeError("unable to mmap 9 bytes from file <last.ckpt>: Cannot allocate memory (12)"),
    ],
)
def test_what_is_wrong_elsewhere_is_no_damage(run_folder, monkeypatch, error):
    def fail(_: Path) -> None:
        raise error

    monkeypatch.setattr(damages, "read", fail)
    cause = "Permission denied|Stale file handle|Cannot allocate memory"
    with pytest.raises(
        UserError, match=rf"cannot read .*last\.ckpt: ({cause}); the file itself may be intact"
    ):
        newest_whole_checkpoint(run_folder)


def test_the_state_before_the_last_one_stays_another_file(run_folder):
    """One bad sector must not damage both."""
    become_newest(run_folder, run_folder / "checkpoints" / "last.ckpt")
    assert files(run_folder) == {"last": 2, "previous": 1, "best": 1}


def test_a_damaged_file_is_set_aside(run_folder):
    last = run_folder / "checkpoints" / "last.ckpt"
    last.write_bytes(b"half of it")
    become_newest(run_folder, last.with_stem("previous"))
    assert files(run_folder) == {"last": 1, "previous": 1, "best": 1}
    assert last.with_name("last.ckpt.damaged").read_bytes() == b"half of it"


def test_every_flipped_bit_is_found_or_harmless(tmp_path):
    """Flips each bit of the archive's directory and some others: a flip is found, or changes nothing."""
    path, good = tmp_path / "x.ckpt", state(3)
    torch.save(good, path)
    content = path.read_bytes()
    directory = content.index(b"PK\x01\x02")
    places = [*range(directory, len(content)), *random.Random(0).sample(range(directory), 100)]
    for number, place in enumerate(places):
        harmed = bytearray(content)
        harmed[place] ^= 1 << (number % 8)
        path.write_bytes(harmed)
        if damage(path) is None:
            for mmap in (False, True):
                found = torch.load(path, weights_only=True, mmap=mmap)
                assert found["policylab"] == good["policylab"]
                assert torch.equal(found["state_dict"]["w"], good["state_dict"]["w"])


def test_a_run_that_goes_back_stays_there(run_folder):
    """If it is killed again before it saves the next state, it resumes from the state that its records end at."""
    become_newest(run_folder, run_folder / "checkpoints" / "best.ckpt")
    assert files(run_folder) == {"last": 1, "previous": 1, "best": 1}
    write_state(state(2), run_folder / "checkpoints" / "last.ckpt")
    assert files(run_folder) == {"last": 2, "previous": 1, "best": 1}


@pytest.mark.parametrize("step", range(5))
def test_there_is_no_moment_without_a_whole_file(run_folder, monkeypatch, step):
    """The process is ended at each of its calls that change the folder."""
    calls = iter(range(100))

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def die_or(*arguments: Any) -> Any:
            if next(calls) == step:
                raise SystemExit
            return call(*arguments)

        return die_or

    for module, name in ((os, "replace"), (os, "fsync"), (os, "link"), (torch, "save")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    with pytest.raises(SystemExit):
        write_state(state(3), run_folder / "checkpoints" / "last.ckpt")
    monkeypatch.undo()
    newest = newest_whole_checkpoint(run_folder)
    assert newest is not None
    assert checkpoint_iteration(newest) == 2
    assert damage(newest.with_stem("previous")) is None


def test_without_second_names_files_are_copied(run_folder, monkeypatch):
    monkeypatch.setattr(checkpoints.os, "link", full_disk)
    write_state(state(3), run_folder / "checkpoints" / "last.ckpt")
    assert files(run_folder) == {"last": 3, "previous": 2, "best": 1}


# -- numbers that are not finite ------------------------------------------------------------------------------

METHODS = {
    "ppo": algo("ppo"),
    "a2c": algo("a2c", "algo/critic=separate"),
    "trpo": algo("trpo"),
    "dqn": algo("dqn"),
    "sft": algo("sft"),
}


def poison(module: Any, iterations: set[int]) -> None:
    """Makes the policy's gradient NaN in these iterations (0-based)."""
    weight = next(p for p in module.policy.actor_parameters() if p.requires_grad)
    weight.register_hook(lambda g: g * float("nan") if module.iteration in iterations else g)


@pytest.mark.parametrize("name", quick(METHODS, ["ppo"]))
def test_an_update_that_is_not_finite_is_left_out(tmp_path, caplog, name):
    algorithm = METHODS[name]
    built = experiment(tmp_path, algorithm, **{"optim.max_skipped": 10_000})
    poison(built.module, {1})
    seen = list[tuple[torch.Tensor, dict[str, float]]]()
    finish = built.module.finish_iteration

    def watch(*arguments: Any) -> None:
        finish(*arguments)
        seen.append((weights(built.module), built.module.metrics))

    built.module.finish_iteration = watch
    module = fit(built)
    assert module.iteration == 3
    (first, _), (second, metrics), (third, after) = seen
    actor = sum(p.numel() for p in module.policy.actor_parameters())
    assert torch.equal(first[:actor], second[:actor])
    assert not torch.equal(second, third)
    assert third.isfinite().all()
    assert metrics["train/skipped_updates"] >= 1
    assert "train/skipped_updates" not in after
    assert "train/loss" not in metrics, "metrics are those of the updates that were made"
    assert "iteration 2: " in caplog.messages[0]
    assert "the update is skipped (1 in a row" in caplog.messages[0]
    assert module.stepper.skipped_in_a_row == {}
    dump = torch.load(tmp_path / "dumps" / "iteration_2.pt", weights_only=True)
    assert dump["iteration"] == 2
    assert len(dump["rollout"]["tokens"]) >= 4
    assert "grad" in dump["not_finite"]


@pytest.mark.parametrize("name", quick(METHODS, ["ppo"]))
def test_a_few_in_a_row_end_the_run(tmp_path, name):
    built = experiment(tmp_path, METHODS[name], iterations=12)
    poison(built.module, set(range(1, 12)))
    with pytest.raises(
        RunError, match=r"not finite, 3 of at most 3 updates skipped in a row; lower optim\.lr"
    ):
        fit(built)
    assert weights(built.module).isfinite().all()
    assert 2 <= len(list((tmp_path / "dumps").iterdir())) <= 3
    last = newest_whole_checkpoint(tmp_path)
    assert last is not None
    assert all(x.isfinite().all() for x in read(last)["state_dict"].values())


def test_a_resumed_run_goes_on_counting(tmp_path):
    algorithm = algo("reinforce")
    built = experiment(tmp_path, algorithm, iterations=2)
    poison(built.module, {0, 1})
    assert fit(built).stepper.skipped_in_a_row == {"update": 2}
    again = experiment(tmp_path, algorithm, iterations=6)
    poison(again.module, {2})
    with pytest.raises(RunError, match=r"iteration 3: .* 3 of at most 3"):
        fit(again, newest_whole_checkpoint(tmp_path))


def test_the_batch_is_named_where_it_comes_with_it(tmp_path, caplog):
    built = experiment(tmp_path, algo("reinforce"), iterations=1)
    estimate = type(built.module.algorithm).estimate_advantages

    class Broken(type(built.module.algorithm)):  # type: ignore[misc]
        def estimate_advantages(self, rollout: Any, all_sum: Any) -> Any:
            rollout = estimate(self, rollout, all_sum)
            return rollout.replace(advantages=rollout.advantages / 0.0)

    object.__setattr__(built.module.algorithm, "__class__", Broken)
    fit(built)
    assert "iteration 1: the rollout's advantages not finite" in caplog.messages[0]


def test_weights_that_are_not_finite_are_never_saved(tmp_path):
    built = experiment(tmp_path, algo("reinforce"), **{"optim.lr": 1e39})
    with pytest.raises(RunError, match=r"after iteration 1 the weights are not finite .*lower optim\.lr"):
        fit(built)
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoints" / "last.ckpt"
    assert checkpoint_iteration(tmp_path / "checkpoints" / "last.ckpt") == 0


# -- a process that ends anywhere -------------------------------------------------------------------------------


def killed(iteration: int, moment: str) -> None:
    """Simulates ``kill -9`` while the state of this iteration is written."""
    dump, replace = torch.save, os.replace

    def half(content: Any, file: Any) -> None:
        dump(content, file)
        if content["policylab"]["iteration"] == iteration:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def die(source: Any, path: Any) -> None:
        name = Path(path).name
        if moment == name and checkpoint_iteration(Path(path).with_name(".last.ckpt")) == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, path)

    if moment == "half":
        torch.save = half
    else:
        os.replace = die


def train_until_killed(folder: Path, algorithm: DictConfig, moment: str) -> None:
    built = experiment(folder, algorithm, iterations=6)
    killed(4, moment)
    fit(built)


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("ppo", "half"),
        *(
            pytest.param(name, moment, marks=pytest.mark.slow)
            for name, moment in (
                ("ppo", "previous.ckpt"),
                ("ppo", "last.ckpt"),
                ("dqn", "half"),
                ("sft", "half"),
            )
        ),
    ],
)
def test_killed_while_a_checkpoint_is_written(tmp_path, name, moment):
    """The run resumes from the state before, and ends with the same weights and metrics, to the bit."""
    algorithm = METHODS[name]
    whole, run = tmp_path / "whole", tmp_path / "run"
    expected = fit(experiment(whole, algorithm, iterations=6))
    process = multiprocessing.get_context("fork").Process(
        target=train_until_killed, args=(run, algorithm, moment)
    )
    process.start()
    process.join(timeout=60)
    assert process.exitcode == -signal.SIGKILL
    checkpoint = newest_whole_checkpoint(run)
    assert checkpoint is not None
    assert checkpoint_iteration(checkpoint) == 3
    rewind(run, 3, validates=False)
    found = fit(experiment(run, algorithm, iterations=6), checkpoint)
    assert torch.equal(weights(found), weights(expected))
    rows = [
        [{k: v for k, v in row.items() if not k.startswith("perf/")} for row in read_rows(f / "metrics.csv")]
        for f in (whole, run)
    ]
    assert len(rows[0]) == 6
    assert rows[0] == rows[1]


class Moody:
    """A reward that uses random numbers and counts its calls."""

    def __init__(self) -> None:
        self.asked = 0

    def __call__(self, completions: Sequence[Completion]) -> list[float]:
        self.asked += len(completions)
        noise = random.random() + float(torch.rand(())) + np.random.default_rng(self.asked).random()
        return [level * noise + np.random.rand() for level in levels(completions)]

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked = state["asked"]


def test_random_rewards_with_state_are_resumed_exactly(tmp_path):
    def run(folder: str, iterations: int, checkpoint: Path | None = None) -> Any:
        built = experiment(tmp_path / folder, algo("reinforce"), iterations=iterations)
        built.module.sampler.scorer.reward = Moody()
        return fit(built, checkpoint)

    whole = run("whole", 4)
    run("cut", 2)
    resumed = run("cut", 4, newest_whole_checkpoint(tmp_path / "cut"))
    assert resumed.sampler.scorer.reward.asked == whole.sampler.scorer.reward.asked == 48
    assert torch.equal(weights(resumed), weights(whole))


def test_a_repeated_validation_counts_once(tmp_path):
    """The first state, and here the best one too, is written after a validation, which a resumed run repeats."""

    def session(checkpoint: Path | None = None) -> Any:
        built = experiment(tmp_path, algo("reinforce"), iterations=2, **{"callbacks.checkpoint.every": 100})
        built.trainer.limit_val_batches = built.trainer.val_check_interval = 1
        module = built.module
        module.sampler.scorer.reward = Moody()
        validated(module, lambda: float(module.iteration == 1))
        with quiet():
            built.trainer.validate(module, datamodule=built.data, ckpt_path=checkpoint, weights_only=True)
        return fit(built, checkpoint)

    whole = session()
    assert files(tmp_path) == {"last": 2, "previous": 0, "best": 1}
    for name, iteration in {"previous": 0, "best": 1}.items():
        checkpoint = tmp_path / "checkpoints" / f"{name}.ckpt"
        assert checkpoint_iteration(checkpoint) == iteration
        rewind(tmp_path, iteration, validates=True)
        resumed = session(checkpoint)
        assert resumed.sampler.scorer.reward.asked == whole.sampler.scorer.reward.asked
        assert torch.equal(weights(resumed), weights(whole))


def test_state_that_cannot_be_saved_is_told_at_the_start(tmp_path):
    built = experiment(tmp_path, algo("reinforce"))
    built.module.sampler.scorer.reward = Moody()
    built.module.sampler.scorer.reward.asked = np.zeros(2)
    with pytest.raises(
        UserError, match="the state_dict of reward Moody must hold only plain values and tensors"
    ):
        fit(built)


def test_workers_keep_no_state():
    with pytest.raises(UserError, match=r"Moody keeps state .* take reward\.workers=0"):
        Scorer(Moody(), 2, "thread")


def best_of(
    folder: Path, checkpoint: Path | None = None, iterations: int = 3, preset: str = "reinforce"
) -> Any:
    """A run that validates in each iteration, improves each time, and exports its best policy."""
    return fit(improving(folder, iterations, preset), checkpoint)


def improving(folder: Path, iterations: int, preset: str) -> Any:
    """Such a run, not yet trained."""
    built = experiment(folder, algo(preset), iterations=iterations)
    built.trainer.limit_val_batches = 1
    built.trainer.val_check_interval = 1
    built.module.policy.lm.name_or_path = "small"
    for callback in built.trainer.callbacks:
        if isinstance(callback, Checkpoint):
            callback.export = True
    validated(built.module, lambda: float(built.module.iteration))
    return built


def validated(module: Any, reward: Callable[[], float]) -> None:
    """Sets the reward that every validation records."""
    record = module.record

    def recorded(metrics: dict[str, float]) -> None:
        if "val/reward" in metrics:
            metrics["val/reward"] = reward()
        record(metrics)

    module.record = recorded


def test_a_best_checkpoint_that_a_kill_left_outdated_is_corrected(tmp_path):
    best_of(tmp_path)
    best, model = tmp_path / "checkpoints" / "best.ckpt", tmp_path / "model"
    assert files(tmp_path) == {"last": 3, "previous": 2, "best": 3}
    assert json.loads((model / "best" / "policylab.json").read_text()) == {"iteration": 3}
    before = (model / "best" / "model.safetensors").read_bytes()
    best.unlink()  # killed between the validation and the new best; and before the export
    os.link(best.with_name("previous.ckpt"), best)
    (model / "best").rename(model / ".best.old")
    shutil.rmtree(model / "final")
    best_of(tmp_path, newest_whole_checkpoint(tmp_path))
    assert files(tmp_path) == {"last": 3, "previous": 2, "best": 3}
    assert (model / "best" / "model.safetensors").read_bytes() == before
    assert (model / "final" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("validates", [True, False])
def test_a_best_checkpoint_after_the_resumed_iteration_is_deleted(tmp_path, validates):
    best_of(tmp_path)
    become_newest(tmp_path, tmp_path / "checkpoints" / "previous.ckpt")
    rewind(tmp_path, 2, validates=validates)
    best_of(tmp_path, tmp_path / "checkpoints" / "last.ckpt", iterations=2)
    best = {} if validates else {"best": 2}  # its validation is repeated first, or is recorded
    assert files(tmp_path) == {"last": 2, "previous": 2} | best
    stamps = [json.loads(path.read_text()) for path in tmp_path.glob("model/best/policylab.json")]
    assert stamps == [{"iteration": iteration} for iteration in best.values()]


def test_an_export_that_fails_leaves_the_old_one(tmp_path, monkeypatch):
    module, target, rename = best_of(tmp_path), tmp_path / "model" / "best", Path.rename
    before = (target / "model.safetensors").read_bytes()

    def fail(path: Path, to: Path) -> Path:
        return full_disk() if path.suffix == ".new" else rename(path, to)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="No space left"):
        write_policy(module.policy, tmp_path / "checkpoints" / "last.ckpt", 3, target)
    assert (target / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in target.parent.iterdir()) == ["best", "final"]


# -- disks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mounted, capture_output=True)
    except OSError:
        pytest.skip("there is no mount")
    if done.returncode:
        pytest.skip("mounting is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Fills the disk completely."""
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as file:
        size = 2**20
        while size:
            try:
                file.write(b"\0" * size)
            except OSError:
                size //= 2
    return filler


class BrieflyFull:
    """A disk on which the next few writes of each kind fail."""

    WRITES = (
        (samples, "append_whole"),
        (metrics_csv, "write_rows"),
        (MetricsCSV, "_write_row"),
        (writing, "save"),
        (checkpoint_callback, "write_json"),
    )

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.refusals = Counter[str]()
        self.refused = set[str]()
        patch.setattr(retry, "PAUSE", 0.001)
        for owner, name in self.WRITES:
            patch.setattr(owner, name, self.refusing(name, getattr(owner, name)))

    def refusing(self, name: str, write: Callable[..., Any]) -> Callable[..., Any]:
        def attempt(*arguments: Any) -> Any:
            if self.refusals[name]:
                self.refusals[name] -= 1
                self.refused.add(name)
                full_disk()
            return write(*arguments)

        return attempt

    def fill_up(self) -> None:
        self.refusals.update({name: 3 for _, name in self.WRITES})


@pytest.mark.parametrize("preset", quick(["dqn", "ppo"], ["ppo"]))
def test_a_disk_that_was_briefly_full_leaves_no_trace(tmp_path, monkeypatch, preset):
    """Checkpoints, exported models, metrics and samples equal those of an undisturbed run, bit for bit."""
    disk = BrieflyFull(monkeypatch)
    for name in ("calm", "disturbed"):
        built = improving(tmp_path / name, 3, preset)
        built.trainer.callbacks.insert(0, Samples(str(tmp_path / name), every=1, keep=4, show=0))
        if name == "disturbed":
            record = built.module.record
            built.module.record = lambda metrics, record=record: (disk.fill_up(), record(metrics))
        fit(built)
        (tmp_path / name / "status.json").write_text("{}")
    assert records.differences(tmp_path / "calm", tmp_path / "disturbed") == []
    assert disk.refused == {name for _, name in disk.WRITES}


def test_records_that_could_not_be_written_are_an_error_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "TIMEOUT", 0.0)
    monkeypatch.setattr(samples, "append_whole", full_disk)
    callback = Samples(str(tmp_path), every=1, keep=1, show=0)
    callback.unwritten = ["waiting"]
    with pytest.raises(RunError, match=r"samples\.jsonl: 1 sample lost"):
        callback.teardown(SimpleNamespace(), None, "fit")
    monkeypatch.setattr(metrics_csv, "write_rows", full_disk)
    logger = MetricsCSV(str(tmp_path))
    logger.log_metrics({"x": 0.0}, step=0)
    logger.finalize("failed")  # the error is already reported
    with pytest.raises(RunError, match=r"metrics\.csv: 1 row missing"):
        logger.finalize("success")


def test_waiting_for_disk_space_ends_after_a_while(monkeypatch):
    monkeypatch.setattr(retry, "TIMEOUT", 0.02)
    monkeypatch.setattr(retry, "PAUSE", 0.001)
    calls = list[int]()

    def refused(code: int) -> None:
        calls.append(code)
        raise OSError(code, os.strerror(code))

    with pytest.raises(PermissionError):
        retry.retry_while_full(partial(refused, errno.EACCES))
    assert calls == [errno.EACCES]
    with pytest.raises(OSError, match="No space left"):
        retry.retry_while_full(partial(refused, errno.ENOSPC))
    assert calls.count(errno.ENOSPC) > 1


def test_a_run_outlives_a_full_disk(small_disk, caplog, monkeypatch):
    """Full from the first iteration to the third, longer than the run waits; afterwards nothing is missing."""
    monkeypatch.setattr(retry, "TIMEOUT", 0.0)
    built = experiment(small_disk, algo("ppo"), iterations=5)
    module, filler = built.module, list[Path]()
    finish = module.finish_iteration

    def act(*arguments: Any) -> None:
        if module.iteration == 1:
            built.trainer.callbacks[-1].writer.wait()
            filler.append(fill(small_disk))
        if module.iteration == 3:
            filler[0].unlink()
        finish(*arguments)

    module.finish_iteration = act
    fit(built)
    assert [row["iteration"] for row in read_rows(small_disk / "metrics.csv")] == [1, 2, 3, 4, 5]
    assert files(small_disk) == {"last": 5, "previous": 4}
    told = "\n".join(caplog.messages)
    assert (
        "last.ckpt: No space left on device; the older file is kept, the run continues and tries again"
        in told
    )
    assert not list(small_disk.rglob(".*")), "nothing half-written stays behind"


def test_in_the_end_a_state_that_could_not_be_written_is_an_error(tmp_path, monkeypatch):
    built = experiment(tmp_path, algo("reinforce"), iterations=2)
    monkeypatch.setattr("policylab.runs.writing.save", full_disk)
    monkeypatch.setattr(retry, "TIMEOUT", 0.0)
    with pytest.raises(RunError, match=r"could not write .*last\.ckpt: No space left on device; make room"):
        fit(built)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_metrics_wait_in_memory_and_in_the_checkpoint(tmp_path, monkeypatch, caplog):
    logger = MetricsCSV(str(tmp_path))
    logger.log_metrics({"x": 0.0}, step=0)
    with monkeypatch.context() as patch:
        patch.setattr("policylab.callbacks.metrics_csv.write_rows", full_disk)
        patch.setattr(logger, "_write_row", full_disk)
        for step in (1, 2):
            logger.log_metrics({"x": step}, step=step)
            logger.log_metrics({"y": -step}, step=step)
        assert [row["iteration"] for row in logger.rows()] == [0, 1, 2]
        assert len(caplog.messages) == 1, "told once"
    unwritten = torch.load(save(logger.unwritten, tmp_path / "x"), weights_only=True)
    expected = [{"iteration": 0, "x": 0}, *({"iteration": i, "x": i, "y": -i} for i in (1, 2))]
    assert read_rows(tmp_path / "metrics.csv") == expected[:1]
    again = MetricsCSV(str(tmp_path))  # of a process that resumes after a kill
    for _ in range(2):  # Lightning restores for a validation and for training
        again.restore(unwritten)
    assert read_rows(tmp_path / "metrics.csv") == expected
    (tmp_path / "metrics.csv").unlink()
    logger.log_metrics({"x": 3}, step=3)
    assert read_rows(tmp_path / "metrics.csv")[-2:] == [expected[2], {"iteration": 3, "x": 3}]
    assert "can be written again" in caplog.messages[-1]


def save(content: Any, path: Path) -> Path:
    torch.save(content, path)
    return path


def test_a_line_is_appended_whole_or_not_at_all(small_disk):
    path = small_disk / "x"
    append_whole(path, "first\n")
    filler = fill(small_disk)
    with pytest.raises(OSError, match="No space left"):
        append_whole(path, "x" * 5000 + "\n")
    assert path.read_text() == "first\n"
    filler.unlink()
    append_whole(path, "second\n")
    assert path.read_text() == "first\nsecond\n"


def test_samples_are_not_written_twice_after_a_resume(tmp_path):
    callback = Samples(str(tmp_path), every=1, keep=1, show=0)
    (tmp_path / "samples.jsonl").write_text("there\n")
    callback.load_state_dict({"unwritten": ["there\n", "waiting\n"]})
    assert callback.unwritten == ["waiting\n"]


def test_a_log_without_room_is_told_once(tmp_path, capsys, monkeypatch):
    handler = LogFile(tmp_path / "train.log")
    monkeypatch.setattr(handler, "flush", full_disk)
    for _ in range(3):
        handler.emit(logging.LogRecord("x", logging.INFO, "", 0, "hello", (), None))
    monkeypatch.undo()
    handler.close()
    assert capsys.readouterr().err.count("No space left on device; the run continues") == 1
    assert (tmp_path / "train.log").read_text() == "hello\n" * 3


# -- loggers --------------------------------------------------------------------------------------------------


class Lost(Logger):
    """A logger whose server is unreachable."""

    name, version = "lost", ""

    def __init__(self) -> None:
        self.calls = 0

    def log_hyperparams(self, params: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls += 1
        raise ConnectionError("no route\nto host")

    def finalize(self, status: str) -> None:
        raise ConnectionError


def test_a_logger_that_fails_is_switched_off(tmp_path, caplog):
    built = experiment(tmp_path, algo("reinforce"))
    lost = tolerated(Lost())
    built.trainer.loggers = [*built.trainer.loggers, lost]
    fit(built)
    assert lost.calls == 1
    (told,) = [message for message in caplog.messages if "turned off" in message]
    assert told.startswith(
        "Lost failed and is turned off for the rest of the run (ConnectionError: no route);"
    )
    assert len(read_rows(tmp_path / "metrics.csv")) == 3


def test_the_record_itself_is_never_switched_off(tmp_path):
    with pytest.raises(ValueError, match="step"):
        tolerated(MetricsCSV(str(tmp_path))).log_metrics({"x": 1.0})
