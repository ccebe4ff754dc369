"""Rows of unequal length: packed one after another without padding, or padded to a grid.

Axes: ``N`` items of all rows, ``R`` rows, ``W`` positions of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Int
from torch import Tensor

from policylab.functional.masks import length_mask


@dataclass(frozen=True)
class Ragged:
    """Places of packed items on a padded grid. `pad` and `pack` can be differentiated any number of times."""

    slots: Int[Tensor, " N"]  #: index of each item in the flattened grid
    rows: int
    width: int

    @classmethod
    def of(cls, lengths: Int[Tensor, " R"], width: int) -> Self:
        """Rows of these lengths: the first ``lengths[r]`` of ``width`` positions of each."""
        slots = length_mask(lengths, width).flatten().nonzero().squeeze(-1)
        return cls(slots, len(lengths), width)

    @property
    def count(self) -> int:
        """``N``."""
        return len(self.slots)

    @property
    def full(self) -> bool:
        """Whether the grid has no padding; `pad` and `pack` are then views."""
        return self.count == self.rows * self.width

    def pad(self, x: Tensor) -> Tensor:
        """``[N, ...]`` on the grid ``[R, W, ...]``, zero elsewhere."""
        grid = x if self.full else _Pad.apply(x, self.slots, self.rows * self.width)
        return grid.reshape(self.rows, self.width, *x.shape[1:])

    def pack(self, x: Tensor) -> Tensor:
        """``[R, W, ...]`` without padding, ``[N, ...]``."""
        grid = x.reshape(self.rows * self.width, *x.shape[2:])
        return grid if self.full else _Pack.apply(grid, self.slots)


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Moves tensors of one dtype from the CPU in one copy."""
    if device.type == "cpu" or not tensors:
        return list(tensors)
    flat = torch.cat([x.flatten() for x in tensors]).to(device)
    parts = flat.split([x.numel() for x in tensors])
    return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]


class _Pad(torch.autograd.Function):
    """Items at their slots. Torch's own gradient of `_Pack` adds rows one by one; here no slot occurs twice."""

    @staticmethod
    def forward(x: Tensor, slots: Tensor, size: int) -> Tensor:
        return x.new_zeros((size, *x.shape[1:])).index_copy_(0, slots, x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, ctx.slots, ctx.size = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Pack.apply(grads[0], ctx.slots), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Pad.apply(tangents[0], ctx.slots, ctx.size)


class _Pack(torch.autograd.Function):
    """Items from their slots."""

    @staticmethod
    def forward(x: Tensor, slots: Tensor) -> Tensor:
        return x.index_select(0, slots)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        x, ctx.slots = inputs
        ctx.size = len(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return _Pad.apply(grads[0], ctx.slots, ctx.size), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        return _Pack.apply(tangents[0], ctx.slots)
