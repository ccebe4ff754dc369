"""Lightning's side of a trainer, for its parts: processes, device, optimizer, backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from policylab.distributed.sharding import release

T = TypeVar("T")


class Runtime:
    """The processes, device and optimizer of a LightningModule. Tests of a part replace the properties by attributes.

    Attributes:
        collective: whether this process has taken part in a collective since this was last set to false. Work that
            contains one cannot be repeated by one process alone.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self.collective = False

    @property
    def rank(self) -> int:
        """Rank of this process."""
        return self._module.global_rank

    @property
    def world_size(self) -> int:
        """Data-parallel processes."""
        return self._module.trainer.world_size

    @property
    def device(self) -> torch.device:
        """The policy's device."""
        return self._module.device

    @property
    def full_precision(self) -> bool:
        """Whether forward passes cast nothing to lower precision."""
        return self._module.trainer.precision == "32-true"

    @property
    def sharded(self) -> bool:
        """Whether each process holds a shard of the weights, so that all processes must make the same passes."""
        return self._module.sharded

    @property
    def optimizer(self) -> Any:
        """The module's optimizer."""
        return self._module.optimizers()

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self._module.trainer.default_root_dir)

    def backward(self, loss: Tensor) -> None:
        """Accumulates gradients, and averages them over processes unless inside `no_sync`."""
        self._module.manual_backward(loss)

    def no_sync(self) -> AbstractContextManager[None]:
        """Inside, backward passes do not average gradients over processes."""
        return self._module.trainer.strategy.block_backward_sync() if self.world_size > 1 else nullcontext()

    def release_weights(self) -> None:
        """Frees the gathered weights that sharded policies still hold after their passes."""
        for network in self._module.children():
            release(network)

    def all_sum(self, x: Tensor) -> Tensor:
        """Sum over processes."""
        return self._reduce(x, "sum")

    def all_max(self, x: Tensor) -> Tensor:
        """Maximum over processes."""
        return self._reduce(x, "max")

    def on_any(self, flag: bool) -> bool:
        """Whether the flag is true on any process."""
        return flag if self.world_size == 1 else bool(self.all_max(torch.tensor(float(flag))) > 0)

    def gather(self, item: T) -> list[T]:
        """The item of each process, in rank order; items must be picklable."""
        items = [item] * self.world_size
        if len(items) > 1:
            self.collective = True
            torch.distributed.all_gather_object(items, item)
        return items

    def _reduce(self, x: Tensor, operation: str) -> Tensor:
        """An all-reduce. Its result is bitwise the same on all processes, so that all make the same decisions."""
        if self.world_size == 1:
            return x
        self.collective = True
        # on the policy's device, which the backend requires; Lightning's `reduce` would add a barrier
        whole = x.detach().to(self.device, copy=True, memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(whole, getattr(torch.distributed.ReduceOp, operation.upper()))
        return whole.to(x.device)
