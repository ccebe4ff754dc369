"""fp32 matrix products on a CPU, by the faster of the two libraries that come with PyTorch.

PyTorch multiplies fp32 matrices with MKL, which is the fastest library on Intel processors and runs at half speed on
AMD's. oneDNN, which PyTorch uses for other precisions, is about as fast on both. `policylab.rollouts.products` measures
which one is faster for each class of products; until `use` is called, PyTorch computes all. The two sum in different
orders, so their results differ by rounding.

oneDNN's operator is private to PyTorch, so it is tried before it is used. It has fast kernels only for matrices that
are contiguous or have a contiguous transpose, and it assumes a contiguous bias; other operands are copied first.

Axes: ``N`` rows, ``I`` and ``O`` inputs and outputs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Multiply-adds from which oneDNN, which is slow to call, can be faster, and from which a product counts as large.
WORTH_A_CALL, LARGE = 2**21, 2**27
#: Below this many rows, lengths are not rounded (`common_length`).
FEW_ROWS = 2**8
#: A packed weight counts as a product with this many rows, whatever their number: large ones do not stay in a core's
#: cache (1 MiB).
PACKED_ROWS = 2**9

#: Memory layouts of a product's operands. ``rows``: the weight ``[O, I]`` is contiguous, as in the forward pass of
#: ``nn.Linear``. ``columns``: its transpose is contiguous, as in the gradient of that layer's input. ``outer``:
#: ``a^T b``, the gradient of weights. ``packed`` and ``activated``: for decoding, a weight in oneDNN's own layout,
#: without and with a fused activation.
TRAINING = ("rows", "columns", "outer")
LAYOUTS = (*TRAINING, "packed", "activated")
SIZES = ("small", "large")
#: All classes of products, ``rows/small`` and so on.
CLASSES = frozenset(map("/".join, itertools.product(LAYOUTS, SIZES)))


@dataclass(frozen=True)
class Choice:
    """The classes of products that oneDNN computes; PyTorch computes the others."""

    reason: str  #: origin of the choice: a measured machine, or a setting
    onednn: frozenset[str]  #: some of `CLASSES`

    def plain(self) -> dict[str, Any]:
        """The choice as plain data, for a checkpoint."""
        return {"reason": self.reason, "onednn": sorted(self.onednn)}


#: The two choices that need no measurement.
PYTORCH, ONEDNN = Choice("pytorch", frozenset()), Choice("onednn", CLASSES)

_choice = PYTORCH


def use(choice: Choice) -> None:
    """Applies the choice to all products of this process from now on.

    Raises:
        ValueError: when it names an unknown class of products.
    """
    global _choice
    if unknown := choice.onednn - CLASSES:
        raise ValueError(f"no classes of products: {sorted(unknown)}; there are {sorted(CLASSES)}")
    _choice = choice


def chosen() -> Choice:
    """The choice in use."""
    return _choice


def restore(saved: dict[str, Any]) -> None:
    """Applies the choice in a checkpoint, if it was made on this machine or by the same setting.

    A resumed run then gives the bits of an uninterrupted one, whatever the machine would choose today.
    """
    if saved["reason"] == _choice.reason:
        use(Choice(saved["reason"], frozenset(saved["onednn"])))


def replaces_layers() -> bool:
    """Whether oneDNN computes any product of training."""
    return any(_choice.onednn & {f"{layout}/{size}" for layout in TRAINING} for size in SIZES)


def common_length(rows: int, device: torch.device) -> int:
    """The number of rows rounded up to one of 16 lengths between two powers of two, if oneDNN is used in training.

    oneDNN creates kernels for each number of rows, half a megabyte per layer, and never frees them, so with all
    lengths memory would grow for the whole run. Less than 256 rows are not rounded.
    """
    if rows < FEW_ROWS or device.type != "cpu" or not replaces_layers():
        return rows
    step = 2 ** (rows.bit_length() - 5)
    return -(-rows // step) * step


def packs(weight_numbers: int, activated: bool) -> bool:
    """Whether oneDNN packs a weight of this many numbers for decoding."""
    return _takes("activated" if activated else "packed", PACKED_ROWS * weight_numbers)


def size_of(multiply_adds: int) -> str:
    """The size class of a product, one of `SIZES`."""
    return "large" if multiply_adds >= LARGE else "small"


@functools.cache
def onednn_multiplies() -> bool:
    """Whether this build and processor have the operator, and it is right, also for transposed operands."""
    x, weight = torch.linspace(-1, 1, 96).view(6, 16), torch.linspace(-1, 1, 128).view(16, 8).t()
    try:
        found = _onednn(x, weight, None)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(found, x @ weight.t(), rtol=1e-5, atol=1e-5)


def linear(
    x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "*N O"]:
    """``x weight^T + bias``, differentiable any number of times, in forward and reverse mode."""
    rows = x.reshape(-1, x.shape[-1])
    if not suits(rows, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(rows, weight, bias).unflatten(0, x.shape[:-1])


def outer(a: Float[Tensor, "N O"], b: Float[Tensor, "N I"]) -> Float[Tensor, "O I"]:
    """``a^T b``. oneDNN does not copy its second operand, so the wider one is second."""
    if not suits(a.t(), b.t()) or not _takes("outer", a.shape[1] * b.numel()):
        return a.t() @ b
    if a.shape[1] <= b.shape[1]:
        return _Linear.apply(a.t(), b.t(), None)
    return _Linear.apply(b.t(), a.t(), None).t()


def suits(x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"]) -> bool:
    """Whether oneDNN may compute the product or one of its gradients."""
    multiply_adds = len(x) * weight.numel()
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and multiply_adds >= WORTH_A_CALL
        and any(_takes(layout, multiply_adds) for layout in TRAINING)
        and not torch.is_autocast_enabled("cpu")
        and onednn_multiplies()
    )


class FastProducts(TorchFunctionMode):
    """While active, `linear` replaces the linear layers of any model, GPT-2's ``Conv1D`` included."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear and not kwargs:
            return linear(*args, *([None] if len(args) == 2 else []))
        if func is torch.addmm and not kwargs and args[0].ndim == 1:
            bias, x, weight = args
            return linear(x, weight.t(), bias)
        return func(*args, **kwargs)


def _takes(layout: str, multiply_adds: int) -> bool:
    return f"{layout}/{size_of(multiply_adds)}" in _choice.onednn


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _dense(matrix: Float[Tensor, "M N"]) -> Float[Tensor, "M N"]:
    """The matrix if it or its transpose is contiguous, else a contiguous copy."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = _dense(weight)
        transposed = not x.is_contiguous() and x.t().is_contiguous()
        layout = "rows" if weight.is_contiguous() else "outer" if transposed else "columns"
        if _takes(layout, len(x) * weight.numel()):
            return _onednn(_dense(x), weight, None if bias is None else bias.contiguous())
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (slope,), (x, weight) = grads, ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        return (
            linear(slope, weight.t(), None) if wants_x else None,
            outer(slope, x) if wants_weight else None,
            slope.sum(0) if wants_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, tangents
        parts = [
            None if of_x is None else linear(of_x, weight, None),
            None if of_weight is None else linear(x, of_weight, None),
            of_bias,
        ]
        total = None
        for part in parts:
            if part is not None:
                total = part if total is None else total + part
        assert total is not None
        return total.expand(len(x), -1)
