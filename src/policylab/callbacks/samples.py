"""Records samples of the policy: in a file, a few on the console, and in a table in W&B."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from lightning import Callback, Trainer
from lightning.pytorch.loggers import WandbLogger

from policylab.callbacks.loggers import attempt
from policylab.callbacks.tables import console, pick, samples_table
from policylab.data.rollout import Sample
from policylab.errors import RunError, counted
from policylab.runs.folder import append_whole
from policylab.runs.retry import RetryLater, retry_while_full

COLUMNS = ("iteration", "split", "prompt", "completion", "reward", "parts", "kl", "length", "ended")


class Samples(Callback):
    """Writes ``samples.jsonl``, one sample a line.

    Args:
        run_dir: folder of the run.
        every: iterations between training samples; samples of each validation are always written.
        keep: how many to write each time: the first ones, so validations always have the same prompts.
        show: how many of a validation to print: the best, the worst, and evenly in between.
    """

    def __init__(self, run_dir: str, every: int, keep: int, show: int) -> None:
        self.path = Path(run_dir) / "samples.jsonl"
        self.every = every
        self.keep = keep
        self.show = show
        self.table: Any = None
        self.unwritten: list[str] = []  # lines
        self.retry_later = RetryLater(self.path, "its lines are kept in memory until it can be written")

    def state_dict(self) -> dict[str, Any]:
        """Lines that could not be written to the file."""
        self.settle()
        return {"unwritten": list(self.unwritten)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the lines that are still missing in the file."""
        written = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        self.unwritten = [line for line in state_dict["unwritten"] if line not in written]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Writes training samples every few iterations. Supervised training has none, only those of the last
        validation."""
        if pl_module.iteration % self.every == 0:
            samples = [sample for sample in pl_module.samples if sample.split == "train"]
            self.write(trainer, chain(*pl_module.runtime.gather(samples[: self.keep])))

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Writes validation samples."""
        samples = list(chain(*pl_module.runtime.gather(pl_module.samples)))
        self.write(trainer, samples)
        if trainer.is_global_zero and self.show and samples:
            console().print(samples_table(pick(samples, self.show)))

    def write(self, trainer: Trainer, samples: Iterable[Sample]) -> None:
        """Appends samples to the file and to W&B's table."""
        kept = list(islice(samples, self.keep))
        if not trainer.is_global_zero or not kept:
            return
        self.unwritten += [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in kept]
        with self.retry_later:
            self.save()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                attempt(logger, partial(self._log_table, logger, kept))

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Raises an error for lines that still cannot be written."""
        self.settle()
        if self.unwritten:
            raise RunError(
                f"could not write {self.path}: {counted(len(self.unwritten), 'sample')} lost; make room, or the file "
                "writable"
            )

    def settle(self) -> None:
        """Writes the waiting lines; on a full disk, waits for room."""
        if self.unwritten:
            with self.retry_later:
                retry_while_full(self.save)

    def save(self) -> None:
        """Appends the waiting lines."""
        append_whole(self.path, "".join(self.unwritten))
        self.unwritten = []

    def _log_table(self, logger: WandbLogger, samples: Sequence[Sample]) -> None:
        import wandb

        if self.table is None:  # a table of the default mode cannot change once it is logged
            self.table = wandb.Table(columns=list(COLUMNS), log_mode="INCREMENTAL")
        for sample in samples:
            fields = asdict(sample)
            self.table.add_data(*(str(fields[c]) if c == "parts" else fields[c] for c in COLUMNS))
        logger.experiment.log({"samples": self.table})
