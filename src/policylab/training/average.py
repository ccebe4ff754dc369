"""An exponential moving average of another network's weights: a moving reference, a target network."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from policylab.distributed.sharding import shard_of


class Average(nn.Module):
    """Moves the weights of a network towards another's.

    Weights below fp32 are rounded copies of averages in fp32, because in bf16 most steps of a hundredth of the
    difference would be lost. The averages are buffers, so that checkpoints hold them.

    Args:
        slow: the network that follows.
        fast: the network it follows. Weights that both share are not changed.
    """

    def __init__(self, slow: nn.Module, fast: nn.Module) -> None:
        super().__init__()
        for name, weight, _ in _pairs(slow, fast):
            if weight.dtype.itemsize < torch.float32.itemsize:
                self.register_buffer(name, weight.detach().float())

    @torch.no_grad()
    def move(self, slow: nn.Module, fast: nn.Module, rate: float) -> None:
        """``slow += rate (fast - slow)``."""
        for name, weight, other in _pairs(slow, fast):
            average = self._buffers.get(name)
            if average is None:
                weight.lerp_(other, rate)
                continue
            self._buffers[name] = average = shard_of(average, weight)  # sharded like the weight
            average.lerp_(other.float(), rate)
            weight.copy_(average)


def average_bytes(count: int, number: int) -> float:
    """Bytes of the fp32 averages of ``count`` weights, ``number`` bytes each."""
    return 4.0 * count if number < 4 else 0.0


def _pairs(slow: nn.Module, fast: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Pairs of weights that differ, with names valid for buffers."""
    others = dict(fast.named_parameters())
    for name, weight in slow.named_parameters():
        if weight is not others[name]:
            yield name.replace(".", "/"), weight, others[name]
