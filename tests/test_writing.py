"""Checkpoints are written during training: complete, in order, with the state at the call; failures are told."""

from __future__ import annotations

import itertools
import multiprocessing
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from policylab.errors import RunError
from policylab.runs import writing
from policylab.runs.checkpoints import link_atomically
from policylab.runs.writing import BackgroundWriter, snapshot, write_state


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """An event; nothing is written before it is set."""
    event = threading.Event()
    original = write_state

    def patient(state: object, path: Path) -> None:
        assert event.wait(timeout=10)
        original(state, path)

    monkeypatch.setattr(writing, "write_state", patient)
    return event


def test_what_is_written_is_the_state_at_the_call(tmp_path, held):
    writer = BackgroundWriter()
    weight, loops = torch.ones(3), {"iteration": 1}
    writer.save_checkpoint({"state": {"w": weight}, "loops": [loops]}, tmp_path / "new" / "last.ckpt")
    assert not list(tmp_path.iterdir()), "training continues at once"
    weight += 1
    loops["iteration"] = 2
    held.set()
    writer.teardown()
    saved = torch.load(tmp_path / "new" / "last.ckpt", weights_only=True)
    assert saved["state"]["w"].tolist() == [1, 1, 1]
    assert saved["loops"] == [{"iteration": 1}]
    assert not list(tmp_path.rglob(".*")), "nothing half-written stays behind"


def test_files_are_written_in_order(tmp_path, held):
    writer = BackgroundWriter()
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    writer.save_checkpoint({"iteration": 1}, last)
    writer.submit(best, lambda: link_atomically(last, best))
    held.set()
    writer.save_checkpoint({"iteration": 2}, last)  # waits for those before it
    writer.wait()
    assert [torch.load(path)["iteration"] for path in (last, best)] == [2, 1]


def test_tied_weights_stay_tied():
    weight = torch.arange(6.0).reshape(2, 3)
    copy = snapshot({"a": weight, "b": weight, "c": weight.T, "d": (1, [weight[0]])})
    assert copy["a"].data_ptr() == copy["b"].data_ptr() != weight.data_ptr()
    assert torch.equal(copy["c"], weight.T)
    assert torch.equal(copy["d"][1][0], weight[0])
    assert copy["d"][0] == 1


def test_the_file_is_that_of_the_state_itself(tmp_path):
    """A saved copy equals the saved state: the same tensors, and no storage twice."""
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(300)).sum().backward()
    optimizer.step()
    state = {
        "state_dict": dict(model.state_dict()),
        "again": model.weight.detach(),
        "o": optimizer.state_dict(),
    }
    torch.save(state, tmp_path / "direct.ckpt")
    writer = BackgroundWriter()
    writer.save_checkpoint(state, tmp_path / "written.ckpt")
    writer.wait()
    sizes = [(tmp_path / f"{name}.ckpt").stat().st_size for name in ("direct", "written")]
    assert abs(sizes[0] - sizes[1]) < 2000
    saved = torch.load(tmp_path / "written.ckpt", weights_only=True)
    for name, value in model.state_dict().items():
        assert torch.equal(saved["state_dict"][name], value)
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(saved["o"]["state"][index][k], v) for k, v in moments.items())


def test_what_could_not_be_written_is_told_at_once_and_in_the_end(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    writer = BackgroundWriter()
    for _ in range(2):
        writer.save_checkpoint({}, tmp_path / "file" / "last.ckpt")
    writer.teardown()
    assert [message.split("; ")[1] for message in caplog.messages] == [
        "there is no older file, the run continues and tries again when the next one is due"
    ] * 2
    with pytest.raises(RunError, match=r"could not write .*file/last\.ckpt: File exists"):
        writer.check_written()
    (tmp_path / "file").unlink()
    writer.save_checkpoint({}, tmp_path / "file" / "last.ckpt")
    writer.check_written()


def test_other_errors_are_raised(tmp_path):
    writer = BackgroundWriter()
    writer.save_checkpoint({"x": lambda: None}, tmp_path / "last.ckpt")
    with pytest.raises(AttributeError, match="lambda"):
        writer.wait()


@pytest.mark.parametrize("call", ["os.fsync", "os.replace", "torch.save"])
def test_a_failed_write_leaves_the_file_before_it(tmp_path, monkeypatch, caplog, call):
    writer = BackgroundWriter()
    path = tmp_path / "last.ckpt"
    writer.save_checkpoint({"iteration": 1}, path)
    writer.wait()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, full)
    monkeypatch.setattr("policylab.runs.retry.TIMEOUT", 0.0)
    writer.save_checkpoint({"iteration": 2}, path)
    writer.wait()
    assert "last.ckpt: No space left on device; the older file is kept" in caplog.text
    assert torch.load(path)["iteration"] == 1
    assert not list(tmp_path.glob(".*"))


def test_a_second_name_survives_a_new_file(tmp_path):
    last, best = tmp_path / "last", tmp_path / "best"
    last.write_text("1")
    link_atomically(last, best)
    (tmp_path / "new").write_text("2")
    (tmp_path / "new").replace(last)
    assert (last.read_text(), best.read_text()) == ("2", "1")


def forked(target: Callable[..., None], *arguments: object) -> Any:
    """A forked process, which needs no imports."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def write_late_and_end(path: Path) -> None:
    BackgroundWriter().submit(path, lambda: (time.sleep(0.5), path.write_text("whole")))  # type: ignore[arg-type,return-value]
    raise KeyboardInterrupt


def test_a_process_that_ends_early_finishes_what_it_writes(tmp_path):
    """After a second Ctrl-C or an exception, the current file is finished before the process ends."""
    process = forked(write_late_and_end, tmp_path / "x")
    process.join(timeout=10)
    assert process.exitcode == 1
    assert (tmp_path / "x").read_text() == "whole"


def write_for_ever(path: Path) -> None:
    writer = BackgroundWriter()
    for i in itertools.count():
        writer.save_checkpoint({"i": i, "w": torch.full((300_000,), float(i))}, path)


@pytest.mark.parametrize("pause", [0.0, 0.02, 0.05, 0.1])
def test_killed_at_any_moment_the_file_is_whole(tmp_path, pause):
    """``kill -9`` while states are written one after another: the last complete one can be read."""
    path = tmp_path / "last.ckpt"
    process = forked(write_for_ever, path)
    while not path.exists():
        time.sleep(0.01)
    time.sleep(pause)
    process.kill()
    process.join(timeout=10)
    saved = torch.load(path, weights_only=True)
    assert torch.equal(saved["w"], torch.full((300_000,), float(saved["i"])))
