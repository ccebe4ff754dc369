"""Records every estimator of the KL to the reference."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, Trainer

from policylab.functional.kl import SAMPLED


class KLMonitor(Callback):
    """Records ``train/kl_k1``, ``train/kl_k2``, ``train/kl_k3`` and, if it was computed, ``train/kl_exact``.

    Each is a sum over a completion's tokens, averaged over completions: nats a sequence. If they differ much, a few
    samples dominate the estimates.

    Args:
        exact: also record ``train/kl_exact``, over the whole vocabulary; two more forward passes.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Turns on the exact KL before the first rollout, because it is computed before the policy is updated."""
        pl_module.track_exact_kl = self.exact

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Adds the estimates to the metrics of the iteration."""
        rollout = pl_module.rollout
        if rollout is None or rollout.ref_logprobs is None:
            return
        grids = {
            name: estimate(rollout.old_logprobs, rollout.ref_logprobs) for name, estimate in SAMPLED.items()
        }
        if rollout.exact_kl is not None:
            grids["exact"] = rollout.exact_kl
        sums = torch.stack([grid.masked_fill(~rollout.action_mask, 0.0).sum() for grid in grids.values()])
        total = pl_module.runtime.all_sum(torch.cat([sums, sums.new_tensor([len(rollout)])]))
        means = (total[:-1] / total[-1]).tolist()
        pl_module.record({f"train/kl_{name}": mean for name, mean in zip(grids, means, strict=True)})
