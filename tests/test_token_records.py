"""``rollouts/``: what the callback records of each token, in runs of a fraction of a second."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from policylab.callbacks.rollouts import Rollouts, pieces, rounded
from policylab.errors import UserError
from policylab.runs.token_records import read_records, recorded, write_records
from small_runs import algo, small, train


def recording(preset: str, folder: Path, task: str = "random_walks") -> Any:
    """A small config that records every second iteration."""
    callback = {
        "_target_": "policylab.callbacks.rollouts.Rollouts",
        "run_dir": str(folder),
        "every": 2,
        "keep": 5,
    }
    return small(algo(preset), {"callbacks.rollouts": callback}, task)


def test_a_few_samples_with_their_tokens_are_recorded_and_training_is_the_same(tmp_path: Path) -> None:
    trace = train(recording("ppo", tmp_path))
    plain = train(small(algo("ppo"), {}))
    assert torch.equal(trace.policy, plain.policy)
    assert trace.metrics == plain.metrics
    files = recorded(tmp_path)
    assert list(files) == [1, 2]
    assert [path.name for path in tmp_path.rglob(".*")] == []
    first = read_records(files[1])
    assert len(first) == 5
    for record in first:
        count = len(record["tokens"])
        columns = (
            "text",
            "chosen",
            "logprobs",
            "ref_logprobs",
            "new_logprobs",
            "advantages",
            "values",
            "entropy",
        )
        assert {len(record[name]) for name in columns} == {count}
        assert all(record["chosen"])
        assert count == record["length"]
        assert record["completion"] in "".join(record["text"])
        assert (record["iteration"], record["split"], record["kept"]) == (1, "train", True)
        # before the first update the policy is the reference; after it, another one
        assert record["logprobs"] == pytest.approx(record["ref_logprobs"], abs=1e-4)
        assert record["new_logprobs"] != record["logprobs"]
        assert min(record["entropy"]) > 0
    before = files[1].read_bytes()
    train(recording("ppo", tmp_path))
    assert files[1].read_bytes() == before, "the same samples give the same bytes"


@pytest.mark.parametrize(
    ("preset", "columns"),
    [
        ("dqn", {"logprobs", "ref_logprobs", "values"}),
        ("grpo", {"logprobs", "ref_logprobs", "new_logprobs", "advantages", "entropy"}),
    ],
)
def test_what_an_algorithm_does_not_have_is_left_out(preset: str, columns: set[str], tmp_path: Path) -> None:
    train(recording(preset, tmp_path))
    (record, *_) = read_records(recorded(tmp_path)[1])
    figures = {"logprobs", "ref_logprobs", "new_logprobs", "advantages", "values", "entropy"}
    assert figures & set(record) == columns


def test_supervised_training_samples_nothing(tmp_path: Path) -> None:
    train(recording("sft", tmp_path))
    assert recorded(tmp_path) == {}


def test_a_record_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    (tmp_path / "rollouts").write_text("in the way")
    train(recording("ppo", tmp_path))
    assert any("could not write" in message and "the run continues" in message for message in caplog.messages)


def test_a_checkpoint_waits_for_the_records_before_it(tmp_path: Path) -> None:
    callback = Rollouts(str(tmp_path), every=1, keep=1)

    def write_slowly() -> None:
        time.sleep(0.1)
        write_records(tmp_path, 3, [])

    callback.writer.submit(tmp_path, write_slowly)
    callback.on_save_checkpoint(SimpleNamespace(), None, {})  # type: ignore[arg-type]
    assert list(recorded(tmp_path)) == [3]
    with pytest.raises(UserError, match=r"callbacks\.rollouts\.keep is 0"):
        Rollouts(str(tmp_path), every=1, keep=0)


def test_tokens_as_text() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids, **_: bytes(ids).decode("utf-8", "replace"))
    text = "né ok"
    assert pieces(tokenizer, list(text.encode())) == ["n", "", "é", " ", "o", "k"]
    assert pieces(tokenizer, list("é".encode())[:1]) == ["\ufffd"]
    assert pieces(tokenizer, []) == []
    assert [rounded(x) for x in (0.123456, float("nan"), 12345.6)] == [0.1235, None, 12350.0]
