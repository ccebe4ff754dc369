"""The prompts of each iteration, as a LightningDataModule.

One batch is one iteration. Its prompts depend only on the seed and the number of the iteration, so a resumed run
continues with the right batch, and every process takes its share of the same batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning import LightningDataModule
from torch.utils.data import DataLoader, Sampler

from policylab.data.rollout import Prompt, PromptBatch
from policylab.errors import UserError, counted
from policylab.tasks.shuffle import permutation

Share = Callable[[Sequence[int]], list[int]]  # of a batch's rows, those of this process


@dataclass(eq=False)
class IterationSampler(Sampler[list[int]]):
    """Rows of each iteration, in a new order every epoch. A batch may span two epochs, so that no row is dropped.

    Args:
        rows: number of rows in the data set.
        batch_size: rows an iteration, over all processes.
        iterations: of the whole run. Also the length, because Lightning also counts iterations before a resume.
        start: the first iteration to yield.
    """

    rows: int
    batch_size: int
    seed: int
    iterations: int
    start: int
    share: Share

    def __iter__(self) -> Iterator[list[int]]:
        for iteration in range(self.start, self.iterations):
            yield self.share(self.batch(iteration))

    def __len__(self) -> int:
        return self.iterations

    def batch(self, iteration: int) -> list[int]:
        """Rows of one iteration (counted from 0), over all processes."""
        first = iteration * self.batch_size
        last = first + self.batch_size - 1
        order: list[int] = []
        for epoch in range(first // self.rows, last // self.rows + 1):
            order += permutation(self.rows, self.seed, epoch)
        offset = first % self.rows
        return order[offset : offset + self.batch_size]


class PromptData(LightningDataModule):
    """Batches of prompts, for training and validation.

    Args:
        train: prompts to train on.
        val: prompts held out; all are used, in order.
        batch_size: prompts an iteration, over all processes.
        val_batch_size: largest number of prompts in a validation batch, over all processes.
        seed: of the order.
        iterations: of the whole run.

    Raises:
        UserError: when a size is not positive, there is no training prompt, or (at the start of a run) a batch has
            fewer prompts than there are processes.
    """

    def __init__(
        self,
        train: Sequence[Prompt],
        val: Sequence[Prompt],
        batch_size: int,
        val_batch_size: int,
        seed: int,
        iterations: int,
    ) -> None:
        super().__init__()
        sizes = {"prompts an iteration": batch_size, "validation.batch_size": val_batch_size}
        for name, value in (sizes | {"training prompts": len(train)}).items():
            if value < 1:
                raise UserError(f"{name}: {value}; there must be at least 1")
        self.train = train
        self.val = val
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size
        self.seed = seed
        self.iterations = iterations
        self.start = 0

    def train_dataloader(self) -> DataLoader[Any]:
        """One batch an iteration."""
        sampler = IterationSampler(
            len(self.train), self.batch_size, self.seed, self.iterations, self.start, self._share
        )
        return DataLoader(self.train, batch_sampler=sampler, collate_fn=_collate)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader[Any]:
        """The held-out prompts in order, those of the first process first. All processes have equally many batches."""
        rows = self._share(range(len(self.val)))
        fewest = len(self.val) // self.trainer.world_size  # type: ignore[union-attr]
        count = min(math.ceil(len(self.val) / self.val_batch_size), fewest)
        batches = [rows[len(rows) * i // count : len(rows) * (i + 1) // count] for i in range(count)]
        return DataLoader(self.val, batch_sampler=batches, collate_fn=_collate)  # type: ignore[arg-type]

    def state_dict(self) -> dict[str, Any]:
        """The number of completed iterations."""
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        return {"iteration": module.iteration}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues after the iterations completed."""
        self.start = state_dict["iteration"]

    def _share(self, rows: Sequence[int]) -> list[int]:
        """This process's contiguous part of a batch; the parts of all processes are the batch."""
        rank, processes = self.trainer.global_rank, self.trainer.world_size  # type: ignore[union-attr]
        if len(rows) < processes:
            raise UserError(
                f"a batch of {counted(len(rows), 'prompt')} cannot be shared by {processes} processes; "
                f"raise its size or lower hardware.devices"
            )
        return list(rows[len(rows) * rank // processes : len(rows) * (rank + 1) // processes])


def _collate(prompts: list[Prompt]) -> PromptBatch:
    return PromptBatch(tuple(prompts))
