"""A run with a user's reward, task or callback: its errors end the run with one line, never silently."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback
from torch import nn

from policylab.config.build import Experiment, build
from policylab.data.rollout import Completion
from policylab.errors import RunError
from policylab.launch.endings import log_failure
from policylab.user_code import call, place, said, shown
from small_runs import algo, quiet, small

VALIDATES = {"task.held_out": 5, "validation.prompts": 5, "validation.batch_size": 2}


class Judge(nn.Module):
    """A reward that is a network with dropout, which changes scores unless it is turned off."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(1, 1), nn.Dropout(0.5))
        self.seen: list[tuple[bool, torch.dtype]] = []

    def forward(self, completions: Sequence[Completion]) -> torch.Tensor:
        lengths = torch.tensor([[float(len(completion.text))] for completion in completions])
        scores = self.layer(lengths)[:, 0]
        self.seen.append((scores.requires_grad, scores.dtype))
        return scores


def stops_at_b(completions: Sequence[Completion]) -> list[float]:
    return [next(1.0 for _ in [0] if completion.prompt != "c") for completion in completions]


class StopsIn(Callback):
    """Raises StopIteration in one of Lightning's hooks."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.stop)

    def stop(self, *_: Any) -> None:
        raise StopIteration


def built(folder: Path, changes: dict[str, Any], preset: str = "grpo") -> Experiment:
    with quiet():
        return build(small(algo(preset), VALIDATES | changes), folder)


def validate(experiment: Experiment) -> None:
    with quiet():
        experiment.trainer.validate(experiment.module, datamodule=experiment.data, verbose=False)


def test_a_validation_counts_its_prompts(tmp_path):
    experiment = built(tmp_path, {})
    validate(experiment)
    assert experiment.module.val_metrics["val/prompts"] == 5
    assert len(experiment.module.samples) == 5


@pytest.mark.parametrize("whose", ["reward", "metrics"])
def test_a_validation_is_not_ended_by_stop_iteration(tmp_path, whose, caplog):
    """The prompts are b, c, d, ... in batches of one and two; without the check, later ones would be skipped."""
    experiment = built(tmp_path, {})
    if whose == "reward":
        experiment.module.sampler.scorer.reward = stops_at_b
    else:
        experiment.module.validator.task.metrics = lambda completions: {"odd": stops_at_b(completions)}
    message = f"{'reward stops_at_b' if whose == 'reward' else 'task random_walks: metrics'} failed at "
    with (
        pytest.raises(
            RunError, match=rf"^{message}.*test_user_code.py:\d+ on the completion .* of the prompt 'c'"
        ),
        log_failure(),
        caplog.at_level(logging.ERROR),
    ):
        validate(experiment)
    assert not experiment.module.val_metrics
    assert "in stops_at_b" in caplog.text, "train.log has the traceback"
    assert "StopIteration" in caplog.text


def test_a_callback_does_not_end_a_validation_either(tmp_path):
    experiment = built(tmp_path, {})
    experiment.trainer.callbacks.append(StopsIn("on_validation_batch_end"))
    with pytest.raises(
        RunError, match="validation of iteration 0 ended after 1 of 5 prompts and is not recorded"
    ):
        validate(experiment)
    assert not experiment.module.val_metrics


def test_a_task_s_prompts_are_read_under_guard(tmp_path, monkeypatch):
    from policylab.tasks.random_walks import RandomWalks

    def broken(self: Any) -> Any:
        raise StopIteration

    monkeypatch.setattr(RandomWalks, "val", property(broken, lambda self, value: None), raising=False)
    with pytest.raises(
        RunError, match=r"task random_walks: val failed at .*test_user_code.py:\d+: StopIteration"
    ):
        built(tmp_path, {})


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_reward_that_is_a_network_is_no_part_of_the_policy(tmp_path, precision):
    """It is frozen and computes in its own precision; its weights are in no checkpoint and no optimizer."""
    own = {
        "reward._target_": "test_user_code.Judge",
        "reward._partial_": False,
        "hardware.precision": precision,
    }
    experiment = built(tmp_path, {**own, "iterations": 1})
    module, trainer = experiment.module, experiment.trainer
    before = [weight.clone() for weight in module.sampler.scorer.reward.parameters()]
    with quiet():
        trainer.fit(module, datamodule=experiment.data)
    assert module.sampler.scorer.reward.seen, "it was asked"
    assert set(module.sampler.scorer.reward.seen) == {(False, torch.float32)}
    assert not module.sampler.scorer.reward.training
    assert all(
        torch.equal(a, b) for a, b in zip(before, module.sampler.scorer.reward.parameters(), strict=True)
    )
    assert not [name for name, _ in module.named_modules() if name.startswith("reward")]
    trainer.save_checkpoint(tmp_path / "state.ckpt")
    saved = torch.load(tmp_path / "state.ckpt", weights_only=True)
    assert not [name for name in saved["state_dict"] if "reward" in name]
    assert saved["policylab"]["reward"] == [None]


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise ValueError


def test_what_is_said_of_errors_and_values_never_fails():
    assert said(Unspeakable()) == "Unspeakable"
    assert said(ValueError("a\nb")) == "ValueError: a b"
    assert shown(10**5000) == "<int>"
    assert len(shown("x" * 100)) == 60
    assert place(ValueError()) == "", "raised by no line of Python"
    with pytest.raises(RunError, match=r"^this failed: ValueError: invalid literal"):
        call("this", int, "x")
