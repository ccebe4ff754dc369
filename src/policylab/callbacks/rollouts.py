"""Records a few training samples with the figures of each token, for the page of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.errors import check_range
from policylab.runs.token_records import FOLDER, write_records
from policylab.runs.writing import BackgroundWriter


class Rollouts(Callback):
    """Writes ``rollouts/iteration_N.jsonl.gz`` in the background: of each token its text, its log-probs at sampling,
    after the update and under the reference, its advantage, its value, and the entropy of the policy there.

    The log-probs after the update and the entropy take one forward pass over these samples.

    Args:
        run_dir: folder of the run.
        every: iterations between two records; the first iteration is always recorded.
        keep: samples in each: the first ones of an iteration.
    """

    def __init__(self, run_dir: str, every: int, keep: int) -> None:
        check_range("callbacks.rollouts.every", every, 1)
        check_range("callbacks.rollouts.keep", keep, 1)
        self.run_dir = Path(run_dir)
        self.every = every
        self.keep = keep
        self.writer = BackgroundWriter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Records the iteration, if it has sampled."""
        iteration, rollout = pl_module.iteration, pl_module.rollout
        if rollout is None or (iteration > 1 and iteration % self.every):
            return
        kept = range(min(self.keep, len(rollout)))
        with trainer.precision_plugin.forward_context():
            mine = self.records(pl_module, rollout.select(torch.tensor(kept, device=rollout.tokens.device)))
        records = list(islice(chain(*pl_module.runtime.gather(mine)), self.keep))
        if trainer.is_global_zero:
            self.writer.wait()
            path = self.run_dir / FOLDER
            self.writer.submit(path, partial(write_records, self.run_dir, iteration, records))

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Waits for the records before a checkpoint: a run that resumes from it does not write them again."""
        self.writer.wait()

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Waits for the last record. One that cannot be written is a warning."""
        self.writer.wait()

    def records(self, module: Any, rollout: Rollout) -> list[dict[str, Any]]:
        """The samples and their tokens; columns that the algorithm does not have are left out.

        Args:
            rollout: the first rows of the iteration.
        """
        grids = {
            "logprobs": rollout.old_logprobs,
            "ref_logprobs": rollout.ref_logprobs,
            "advantages": rollout.advantages,
            "values": rollout.values,
        }
        if rollout.advantages is not None:
            grids |= dict(zip(("new_logprobs", "entropy"), self.after_update(module, rollout), strict=True))
        there = {name: grid for name, grid in grids.items() if grid is not None}
        table = torch.stack([grid.float() for grid in there.values()], dim=1).tolist()
        tokens, lengths = rollout.tokens.tolist(), rollout.lengths.tolist()
        chosen, trained = rollout.action_mask.tolist(), rollout.loss_mask.any(-1).tolist()
        return [
            {
                **asdict(sample),
                "tokens": tokens[row][:length],
                "text": pieces(module.policy.tokenizer, tokens[row][:length]),
                "chosen": chosen[row][:length],
                "kept": trained[row],
                **{
                    name: [rounded(x) for x in values[:length]]
                    for name, values in zip(there, table[row], strict=True)
                },
            }
            for row, (sample, length) in enumerate(zip(module.samples[: len(rollout)], lengths, strict=True))
        ]

    def after_update(self, module: Any, rollout: Rollout) -> Tensor:
        """Log-probs and entropy under the updated policy, ``[2, B, T]``."""

        def evaluate(piece: Rollout) -> Tensor:
            now = module.policy.evaluate(
                piece, module.sampler.engine.temperature, entropy_gradient=False, reference=None
            )
            return torch.stack([now.logprobs, now.entropy])

        return torch.as_tensor(module.passes.per_token(rollout, evaluate))


def rounded(value: float) -> float | None:
    """Four significant digits; None for a value that is not finite."""
    return float(f"{value:.4g}") if math.isfinite(value) else None


def pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """The text of each token as it adds to those before it; of a character made of several tokens, the last has it."""
    found, start, read = list[str](), 0, 0
    for end in range(1, len(tokens) + 1):
        before, whole = decoded(tokenizer, tokens[start:read]), decoded(tokenizer, tokens[start:end])
        if whole.endswith("\ufffd") and end < len(tokens):
            found.append("")
            continue
        found.append(whole[len(before) :])
        start, read = read, end
    return found


def decoded(tokenizer: Any, tokens: Sequence[int]) -> str:
    """Text with special tokens."""
    return str(tokenizer.decode(list(tokens), clean_up_tokenization_spaces=False))
