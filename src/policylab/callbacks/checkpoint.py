"""What is kept of a run: its whole state to go on from, and the policy in Hugging Face format."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer

from policylab.callbacks.metrics_file import best_row, read_rows
from policylab.callbacks.writing import BackgroundWriter, snapshot
from policylab.errors import UserError
from policylab.launch.checkpoints import link_atomically
from policylab.models.loading import quiet_bars


class Checkpoint(Callback):
    """Saves ``checkpoints/last.ckpt`` and ``best.ckpt``, and the policies in ``model/best`` and ``model/final``.

    Each is written beside its place and renamed onto it: whatever kills the run, what stands there is whole. Training
    goes on meanwhile, from a copy of the state in main memory on.

    Args:
        run_dir: folder of the run.
        every: iterations between two states; the last one is saved in any case.
        monitor: validation metric that decides what is best.
        mode: "max" or "min".
        export: write the policies in Hugging Face format as well.
    """

    def __init__(self, run_dir: str, every: int, monitor: str, mode: str, export: bool) -> None:
        if mode not in ("max", "min"):
            raise UserError(f"callbacks.checkpoint.mode is {mode}; choose max or min")
        if every < 1:
            raise UserError(f"callbacks.checkpoint.every is {every}; it must be at least 1")
        self.run_dir = Path(run_dir)
        self.last = self.run_dir / "checkpoints" / "last.ckpt"
        self.best = self.run_dir / "checkpoints" / "best.ckpt"
        self.every = every
        self.monitor = monitor
        self.mode = mode
        self.export = export
        self.saved_at = -1  # iteration of last.ckpt, as far as this process knows
        self.writer = BackgroundWriter()

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Lightning hands its checkpoints to the writer, and waits for it at the end."""
        trainer.strategy.checkpoint_io = self.writer

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """A run that is killed early can go on as well."""
        if pl_module.iteration == 0:
            self.save_last(trainer, pl_module)
            if pl_module.val_metrics:  # empty in a run that goes on from here: its best is on file already
                self.keep_if_best(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Here, between two iterations, Lightning's loops can be picked up again exactly."""
        done = pl_module.iteration
        if done % self.every == 0 or done == pl_module.iterations or trainer.should_stop:
            self.save_last(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Lets a finished run be prolonged: whether a batch was the last is for the resuming command to say."""
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keeps the best."""
        if pl_module.iteration > 0 and not trainer.sanity_checking:
            self.keep_if_best(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Exports the final policy."""
        if self.export and trainer.is_global_zero:
            self.export_policy(pl_module, "final")
        self.writer.wait()

    def save_last(self, trainer: Trainer, module: Any) -> None:
        """Writes ``last.ckpt``."""
        trainer.save_checkpoint(self.last)
        self.saved_at = module.iteration

    def keep_if_best(self, trainer: Trainer, module: Any) -> None:
        """Writes ``best.ckpt`` and ``model/best`` when the validation just done is the best of this run.

        The metrics on file decide, so that a resumed run compares with what came before it.
        """
        if self.monitor not in module.val_metrics:
            known = ", ".join(sorted(module.val_metrics))
            raise UserError(
                f"callbacks.checkpoint.monitor={self.monitor} is not measured; choose from: {known}"
            )
        best = best_row(read_rows(self.run_dir / "metrics.csv"), self.monitor, self.mode)
        if best is None or best["iteration"] != module.iteration:
            return
        if self.saved_at == module.iteration:  # the same state: a second name for the same file
            if trainer.is_global_zero:
                self.writer.submit(self.best, partial(link_atomically, self.last, self.best))
        else:
            trainer.save_checkpoint(self.best)
        if self.export and trainer.is_global_zero:
            self.export_policy(module, "best")

    def export_policy(self, module: Any, name: str) -> None:
        """Has the policy written as a Hugging Face folder."""
        self.writer.wait()
        target = self.run_dir / "model" / name
        weights = snapshot(module.policy.lm.state_dict())
        self.writer.submit(target, partial(write_policy, module.policy, weights, target))


def write_policy(policy: Any, weights: dict[str, Any], target: Path) -> None:
    """Writes a policy with the given weights as a Hugging Face folder, whole or not at all."""
    temporary, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    with quiet_bars(True):
        policy.lm.save_pretrained(temporary, state_dict=weights)
    policy.tokenizer.save_pretrained(temporary)
    if target.exists():
        target.rename(old)
    temporary.rename(target)
    shutil.rmtree(old, ignore_errors=True)
