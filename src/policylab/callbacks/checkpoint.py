"""Saves the state of training, and exports the policy in Hugging Face format."""

from __future__ import annotations

import errno
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from safetensors import SafetensorError

from policylab.callbacks.metrics_csv import MetricsCSV
from policylab.errors import UserError, check_range
from policylab.models.adapted import save_adapters, whole_weights
from policylab.models.loading import quiet_bars
from policylab.runs.checkpoints import LAST, checkpoint_iteration, link_atomically
from policylab.runs.damage import read
from policylab.runs.find import STAMP, exported_iteration
from policylab.runs.folder import write_json
from policylab.runs.metrics_file import best_row
from policylab.runs.writing import BackgroundWriter


class Checkpoint(Callback):
    """Saves ``checkpoints/last.ckpt`` and ``best.ckpt``, and the policies in ``model/best`` and ``model/final``.

    Each is written in the background to a temporary file and renamed, so the files are whole even if the run is killed.
    The state before the last one is kept as ``checkpoints/previous.ckpt``. Policies are exported from the checkpoints,
    so both are always of the same iteration.

    Args:
        run_dir: folder of the run.
        every: iterations between two states; the last one is always saved.
        monitor: validation metric that decides which iteration after the first is best.
        mode: "max" or "min".
        export: also write the policies in Hugging Face format.
    """

    def __init__(self, run_dir: str, every: int, monitor: str, mode: str, export: bool) -> None:
        if mode not in ("max", "min"):
            raise UserError(f"callbacks.checkpoint.mode is {mode}; choose max or min")
        if "loss" in monitor and mode == "max":
            raise UserError(
                f"callbacks.checkpoint.monitor={monitor} is a loss: lower is better; take callbacks.checkpoint.mode=min"
            )
        check_range("callbacks.checkpoint.every", every, 1)
        self.run_dir = Path(run_dir)
        self.last = self.run_dir / "checkpoints" / LAST
        self.best = self.run_dir / "checkpoints" / "best.ckpt"
        self.every = every
        self.monitor = monitor
        self.mode = mode
        self.export = export
        self.saved_at = -1  # iteration of last.ckpt, once it is written
        self.writer = BackgroundWriter()

    # -- when to save: called on every process -------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Makes Lightning use the writer for its checkpoints, and wait for it at the end."""
        trainer.strategy.checkpoint_io = self.writer

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        """In a resumed run, does the work that a kill has prevented."""
        if trainer.is_global_zero and trainer.ckpt_path is not None:
            self.writer.submit(self.best, partial(self.catch_up, trainer, pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Saves the state before the first iteration, so that a run killed early can be resumed."""
        self.saved_at = pl_module.iteration  # a resumed state is already saved
        if trainer.ckpt_path is None:
            self.save_last(trainer, pl_module)
            if pl_module.val_metrics:
                self.check_measured(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves between two iterations, because there Lightning's loops can be resumed exactly."""
        done = pl_module.iteration
        if done % self.every == 0 or done == pl_module.progress.iterations or trainer.should_stop:
            self.save_last(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Keeps the best checkpoint."""
        if pl_module.iteration > 0 and not trainer.sanity_checking:
            self.keep_if_best(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Exports the final policy, also when a run that was killed after its last iteration is resumed."""
        self.saved_at = pl_module.iteration
        if trainer.is_global_zero:
            self.export_policy(pl_module, "final", self.last)

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Raises an error for files that still could not be written."""
        self.writer.check_written()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Allows a finished run to be extended: the resuming command decides which batch is the last.

        Also saves metrics that could not be written to their file.
        """
        checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["is_last_batch"] = False
        for csv in metrics_files(trainer):
            csv.settle()
        checkpoint["unwritten_metrics"] = [row for csv in metrics_files(trainer) for row in csv.unwritten]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Restores those metrics."""
        for csv in metrics_files(trainer):
            csv.restore(checkpoint.get("unwritten_metrics", []))

    # -- what to save ------------------------------------------------------------------------------------------

    def save_last(self, trainer: Trainer, module: Any) -> None:
        """Writes ``last.ckpt``. Weights that are not finite end the run, and the last finite ones are kept."""
        module.stepper.check_weights()
        # without weights_only Lightning warns about its default
        trainer.save_checkpoint(self.last, weights_only=False)
        self.saved_at = module.iteration

    def keep_if_best(self, trainer: Trainer, module: Any) -> None:
        """Writes ``best.ckpt`` and ``model/best`` if the last validation is the best of this run.

        The recorded metrics decide, so that a resumed run compares with its earlier sessions; and those of rank 0, so
        that all processes do the same.
        """
        self.check_measured(module)
        iteration = module.iteration
        if not trainer.strategy.broadcast(self.best_iteration(trainer) == iteration):
            return
        if self.saved_at == iteration:  # the same state as last.ckpt: a hard link is enough
            if trainer.is_global_zero:
                self.writer.submit(self.best, partial(link_state, self.last, self.best, iteration))
        elif trainer.state.fn == TrainerFn.FITTING:
            module.stepper.check_weights()
            trainer.save_checkpoint(self.best, weights_only=False)
        else:  # before a resumed run trains; `catch_up` runs next
            return
        if trainer.is_global_zero:
            self.export_policy(module, "best", self.best)

    def check_measured(self, module: Any) -> None:
        """Refuses a monitor that is not among the validation metrics."""
        if self.monitor not in module.val_metrics:
            known = ", ".join(sorted(module.val_metrics))
            raise UserError(
                f"callbacks.checkpoint.monitor={self.monitor} is not measured; choose from: {known}"
            )

    def best_iteration(self, trainer: Trainer) -> int | None:
        """Iteration of the best recorded validation; None on processes without records."""
        rows = [row for csv in metrics_files(trainer) for row in csv.rows()]
        best = best_row(rows, self.monitor, self.mode)
        return int(best["iteration"]) if best else None

    def catch_up(self, trainer: Trainer, module: Any) -> None:
        """Does the work that a kill has prevented: links ``last.ckpt`` as the best if its validation is the best on
        record, and exports the best. Deletes a best checkpoint that is newer than the resumed state."""
        done = checkpoint_iteration(self.last)
        if (iteration_of(self.best) or 0) > done:
            self.best.unlink()
        if self.best_iteration(trainer) == done and iteration_of(self.best) != done:
            link_state(self.last, self.best, done)
        target = self.run_dir / "model" / "best"
        if (exported_iteration(target) or 0) > done:
            shutil.rmtree(target)
        kept = iteration_of(self.best)
        if self.export and kept is not None and exported_iteration(target) != kept:
            write_policy(module.policy, self.best, kept, target)

    def export_policy(self, module: Any, name: str, source: Path) -> None:
        """Queues the export of ``source``, a checkpoint of the current state, as a Hugging Face folder."""
        target = self.run_dir / "model" / name
        if self.export:
            write = partial(write_policy, module.policy, source, module.iteration, target)
            self.writer.submit(target, write)


def metrics_files(trainer: Trainer) -> list[MetricsCSV]:
    """The run's ``metrics.csv``; empty except on rank 0."""
    return [logger for logger in trainer.loggers if isinstance(logger, MetricsCSV)]


def iteration_of(checkpoint: Path) -> int | None:
    """The iteration of a checkpoint; None if it is missing or damaged."""
    try:
        return checkpoint_iteration(checkpoint)
    except UserError:
        return None


def check_iteration(checkpoint: Path, iteration: int) -> None:
    """Raises OSError if a checkpoint is of another iteration, because that of this one could not be written."""
    if (found := iteration_of(checkpoint)) != iteration:
        raise OSError(f"{checkpoint.name} is of iteration {found}, not {iteration}")


def link_state(source: Path, path: Path, iteration: int) -> None:
    """Links the checkpoint of an iteration to a second path."""
    check_iteration(source, iteration)
    link_atomically(source, path)


def write_policy(policy: Any, checkpoint: Path, iteration: int, target: Path) -> None:
    """Writes the policy of a checkpoint as a Hugging Face folder, completely or not at all.

    Adapters are merged into the weights, and also written in PEFT's format.
    """
    check_iteration(checkpoint, iteration)
    saved = read(checkpoint)["state_dict"]
    weights = {  # checkpoints lack frozen weights
        name: saved[key] if (key := f"policy.lm.{name}") in saved else value.cpu()
        for name, value in policy.lm.state_dict().items()
    }
    temporary, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        # so that the exported policy ends completions at the same tokens
        if policy.lm.generation_config is not None:
            ids = list(policy.eos_ids)
            policy.lm.generation_config.eos_token_id = ids if len(ids) > 1 else ids[0]
        with quiet_bars(True):
            policy.lm.save_pretrained(temporary, state_dict=dict(whole_weights(policy.lm, weights)))
        if policy.adapted:
            save_adapters(policy.lm, weights, temporary / "adapter")
        policy.tokenizer.save_pretrained(temporary)
        write_json(temporary / STAMP, {"iteration": iteration})
        if target.exists():
            target.rename(old)
        try:
            temporary.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except SafetensorError as error:  # has the system's error only as text
        full = os.strerror(errno.ENOSPC) in str(error)
        raise (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) if full else OSError(str(error))) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
