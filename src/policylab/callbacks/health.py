"""Warns of early signs of trouble, each with advice."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning import Callback, Trainer

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Health(Callback):
    """Warns, on the console and in ``train.log``; it never stops a run.

    Args:
        quiet_iterations: smallest number of iterations between two warnings of the same kind.
        max_kl: nats a sequence to the reference; above it, the policy has moved too far.
        min_entropy_share: of the first iteration's entropy; below it, the policy has collapsed.
        min_reward_std: of the rewards of an iteration; below it, the rewards are too equal to learn from.
        min_ended_share: of the completions; below it, the length limit cuts nearly all. Checked only if the first
            iteration was above it, so that tasks whose completions never end get no warning.
        max_clip_fraction: of the tokens; above it, most of an update is lost. Checked from the second iteration on,
            because Adam's first steps have the same size for all weights and clip more than later ones.
    """

    quiet_iterations: int
    max_kl: float
    min_entropy_share: float
    min_reward_std: float
    min_ended_share: float
    max_clip_fraction: float

    def __post_init__(self) -> None:
        self.first: dict[str, float] = {}
        self.warned_at: dict[str, int] = {}

    def state_dict(self) -> dict[str, Any]:
        """The metrics of the first iteration, and when each warning was given."""
        return {"first": dict(self.first), "told": dict(self.warned_at)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores them."""
        self.first = dict(state_dict["first"])
        self.warned_at = dict(state_dict["told"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Checks the metrics of the iteration."""
        metrics, iteration = pl_module.metrics, pl_module.iteration
        self.first = self.first or dict(metrics)
        if not trainer.is_global_zero:
            return
        for sign, advice in self.examine(metrics).items():
            if sign == "clip" and iteration == 1:
                continue
            if iteration - self.warned_at.get(sign, -self.quiet_iterations) >= self.quiet_iterations:
                self.warned_at[sign] = iteration
                log.warning("iteration %d: %s", iteration, advice)

    def examine(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """The signs that are found, each with its advice. Skips metrics that a run does not have."""
        found = {}
        bad = [name for name, value in metrics.items() if not math.isfinite(value)]
        if bad:
            found["non-finite"] = (
                f"{', '.join(bad)} not finite; lower optim.lr, or run with debug=nan to find where"
            )
        kl = metrics.get("train/kl", 0.0)
        if kl > self.max_kl:
            found["kl"] = (
                f"KL to the reference is {kl:.1f} nats a sequence (above {self.max_kl:g}): the policy diverges "
                "from it; raise the KL coefficient, or lower optim.lr"
            )
        entropy, at_first = metrics.get("train/entropy"), self.first.get("train/entropy")
        if entropy is not None and at_first and entropy < self.min_entropy_share * at_first:
            found["entropy"] = (
                f"entropy fell from {at_first:.2f} to {entropy:.2f} nats a token: the policy repeats itself; "
                "raise algo.entropy_coef or the KL coefficient, or lower optim.lr"
            )
        spread = metrics.get("train/reward_std")
        if spread is not None and spread < self.min_reward_std:
            found["spread"] = (
                f"all rewards are the same (std {spread:.2g}), so the policy cannot learn; look at "
                "samples.jsonl, raise rollout.temperature, or take a reward that distinguishes samples"
            )
        found |= self._length(metrics)
        clipped = metrics.get("train/clip_fraction", 0.0)
        if clipped > self.max_clip_fraction:
            found["clip"] = (
                f"{clipped:.0%} of the tokens are clipped (above {self.max_clip_fraction:.0%}): updates are too "
                "large; lower optim.lr or the number of epochs"
            )
        return found

    def _length(self, metrics: Mapping[str, float]) -> dict[str, str]:
        ended, at_first = metrics.get("train/ended"), self.first.get("train/ended", 0.0)
        if ended is None or ended >= self.min_ended_share or at_first < self.min_ended_share:
            return {}
        limit = "rollout.max_new_tokens" if "train/turns" not in metrics else "task.turns"
        return {
            "length": f"{1 - ended:.0%} of the completions are cut at the length limit (first: {1 - at_first:.0%}); "
            f"raise {limit}, or reward brevity"
        }
