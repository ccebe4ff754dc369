"""Metrics and samples of rollouts, in training and in validation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from policylab.data.rollout import Completion, Rollout, Sample
from policylab.errors import UserError
from policylab.functional.masks import AllSum, masked_moments, masked_sum
from policylab.training.means import Means, Total
from policylab.user_code import check_names, shown

#: Metrics by name, some of them still on the device.
Numbers = Mapping[str, Tensor | float]


def measure(rollout: Rollout, means: Means, split: str) -> None:
    """Adds the metrics of a rollout that both training and validation record."""
    assert rollout.rewards is not None
    mask = rollout.action_mask
    means.add(f"{split}/reward", rollout.rewards)
    if rollout.reward_parts is not None:
        for k, name in enumerate(rollout.part_names):
            means.add(f"{split}/reward/{name}", rollout.reward_parts[:, k])
    means.add(f"{split}/length", mask.sum(-1))
    means.add(f"{split}/ended", rollout.ended)
    if rollout.turn_ends is not None:
        means.add(f"{split}/turns", rollout.turn_ends.sum(-1))
    if rollout.ref_logprobs is not None:
        log_ratio = rollout.old_logprobs - rollout.ref_logprobs
        means.add(f"{split}/kl", masked_sum(log_ratio, mask))
        means.add(f"{split}/kl_token", log_ratio, mask)


def describe(rollout: Rollout, completions: Sequence[Completion], split: str, iteration: int) -> list[Sample]:
    """Completions with their rewards and lengths, for display. One device-to-host copy for all."""
    assert rollout.rewards is not None
    assert rollout.reward_parts is not None
    columns = [rollout.action_mask.sum(-1)[:, None], rollout.rewards[:, None], rollout.reward_parts]
    if rollout.ref_logprobs is not None:
        log_ratio = rollout.logprobs - rollout.ref_logprobs
        columns.append(masked_sum(log_ratio, rollout.action_mask)[:, None])
    parts = slice(2, 2 + len(rollout.part_names))
    return [
        Sample(
            iteration=iteration,
            split=split,
            prompt=completion.prompt,
            completion=completion.transcript,
            reward=row[1],
            parts=dict(zip(rollout.part_names, row[parts], strict=True)),
            kl=None if rollout.ref_logprobs is None else row[-1],
            length=int(row[0]),  # without an environment's words
            ended=completion.ended,
            tokens=completion.tokens,
        )
        for row, completion in zip(torch.cat(columns, dim=1).tolist(), completions, strict=True)
    ]


def of_iteration(rollout: Rollout, all_sum: AllSum) -> dict[str, Tensor | float]:
    """Metrics that are not means. ``tokens`` counts the sampled tokens, for the speed."""
    assert rollout.rewards is not None
    every = torch.ones_like(rollout.rewards, dtype=torch.bool)
    _, variance = masked_moments(rollout.rewards[:, None], every[:, None], all_sum)
    return {"train/reward_std": variance.sqrt(), "tokens": all_sum(rollout.action_mask.sum())}


def means_of(totals: Mapping[str, Total]) -> dict[str, float]:
    """By name. A part of a reward is 0 for the completions that lack it, so it is divided by the number of rewards."""
    means = {}
    for name, total in totals.items():
        reward = name.partition("/")[0] + "/reward"
        means[name] = (
            total.sum / (totals.get(reward, total) if name.startswith(f"{reward}/") else total).values
        )
    return means


def check_numbers(trainer: str, metrics: Any) -> None:
    """Refuses metrics of an iteration that are no numbers by name, or do not count tokens.

    Raises:
        UserError: naming the trainer and the metric.
    """
    check_names(trainer, "metrics of an iteration", metrics, nested=True)
    for name, value in metrics.items():
        if not (value.ndim == 0 if isinstance(value, Tensor) else isinstance(value, Real)):
            raise UserError(f"{trainer} gave {shown(value)} as the metric {name}; it must be one number")
    if "tokens" not in metrics:
        raise UserError(
            f"{trainer} gave no 'tokens' among the metrics of an iteration: how many it has sampled or read; "
            "of_iteration(rollout, all_sum) counts them"
        )


def on_host(metrics: Numbers) -> dict[str, float]:
    """All metrics as Python floats, in one device-to-host copy."""
    tensors = {name: value for name, value in metrics.items() if isinstance(value, Tensor)}
    numbers = torch.stack([value.double() for value in tensors.values()]).tolist() if tensors else []
    return {**metrics, **dict(zip(tensors, numbers, strict=True))}
