"""fp32 products of matrices on a CPU, by the faster of the two libraries that PyTorch carries.

PyTorch multiplies fp32 matrices with MKL, which is the fastest there is on Intel processors and runs at half speed on
AMD's. oneDNN, which PyTorch carries for other precisions, is about as fast on both. Which of them is faster for which
products `policylab.rollouts.products` measures; until `use` is called all products are PyTorch's own. Sums are taken in
another order, so results differ by rounding.

oneDNN's operator is private to PyTorch, so it is tried before it is used. It has fast kernels only for matrices that
are contiguous, or whose transpose is, and reads a bias as if it were contiguous: others are copied first.

Axes: ``N`` rows, ``I`` and ``O`` what goes in and comes out.
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

#: Multiply-adds from which oneDNN, slow to call, can be the faster one, and from which a product is a large one.
WORTH_A_CALL, LARGE = 2**21, 2**27
#: Rows of which there are too few to be worth a common length.
FEW_ROWS = 2**8
#: A weight that is to be packed counts as a product with so many rows, however many there are: large is what does not
#: stay in a core's cache (1 MiB).
PACKED_ROWS = 2**9

#: How the operands of a product lie. ``rows``: the weight ``[O, I]`` is contiguous, as in the forward pass of
#: ``nn.Linear``. ``columns``: its transpose is, as in the gradient by that layer's input. ``outer``: ``a^T b``, the
#: gradient by weights. ``packed`` and ``activated``: for decoding, a weight in oneDNN's own layout, without and with an
#: activation that oneDNN computes on the way.
TRAINING = ("rows", "columns", "outer")
LAYOUTS = (*TRAINING, "packed", "activated")
SIZES = ("small", "large")
#: All classes of products, ``rows/small`` and so on.
CLASSES = frozenset(map("/".join, itertools.product(LAYOUTS, SIZES)))


@dataclass(frozen=True)
class Choice:
    """Which products oneDNN takes; the others are PyTorch's own."""

    reason: str  #: what the choice is from: a machine that was measured, or a setting
    onednn: frozenset[str]  #: some of `CLASSES`

    def plain(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"reason": self.reason, "onednn": sorted(self.onednn)}


#: The two choices that need no measuring.
PYTORCH, ONEDNN = Choice("pytorch", frozenset()), Choice("onednn", CLASSES)

_choice = PYTORCH


def use(choice: Choice) -> None:
    """Takes the choice for all products of this process from now on.

    Raises:
        ValueError: when it names no class of products.
    """
    global _choice
    if unknown := choice.onednn - CLASSES:
        raise ValueError(f"no classes of products: {sorted(unknown)}; there are {sorted(CLASSES)}")
    _choice = choice


def chosen() -> Choice:
    """The choice in use."""
    return _choice


def go_on(with_choice: dict[str, Any]) -> None:
    """Takes the choice that a checkpoint carries, if it was made on this machine, or by this setting.

    The bits are those of a run that was never interrupted then, whatever the machine would choose today.
    """
    if with_choice["reason"] == _choice.reason:
        use(Choice(with_choice["reason"], frozenset(with_choice["onednn"])))


def replaces_layers() -> bool:
    """Whether oneDNN takes any product of training."""
    return any(_choice.onednn & {f"{layout}/{size}" for layout in TRAINING} for size in SIZES)


def common_length(rows: int, device: torch.device) -> int:
    """So many rows or a few more: one of 16 lengths between a power of two and the next, where oneDNN trains.

    oneDNN makes kernels for each number of rows, half a megabyte for a layer, and never forgets them: with rows of
    every length memory would grow for the whole run. Less than 256 rows stay as they are.
    """
    if rows < FEW_ROWS or device.type != "cpu" or not replaces_layers():
        return rows
    step = 2 ** (rows.bit_length() - 5)
    return -(-rows // step) * step


def packs(weight_numbers: int, activated: bool) -> bool:
    """Whether decoding has oneDNN pack a weight of so many numbers."""
    return _takes("activated" if activated else "packed", PACKED_ROWS * weight_numbers)


def size_of(multiply_adds: int) -> str:
    """One of `SIZES`."""
    return "large" if multiply_adds >= LARGE else "small"


@functools.cache
def onednn_multiplies() -> bool:
    """Whether this build and processor have the operator, and it gives the product, transposed operands included."""
    x, weight = torch.linspace(-1, 1, 96).view(6, 16), torch.linspace(-1, 1, 128).view(16, 8).t()
    try:
        found = _onednn(x, weight, None)
    except (AttributeError, NotImplementedError, RuntimeError):
        return False
    return torch.allclose(found, x @ weight.t(), rtol=1e-5, atol=1e-5)


def linear(
    x: Float[Tensor, "*N I"], weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None
) -> Float[Tensor, "*N O"]:
    """``x weight^T + bias``, differentiable as often as one likes, in both modes."""
    rows = x.reshape(-1, x.shape[-1])
    if not suits(rows, weight):
        return F.linear(x, weight, bias)
    return _Linear.apply(rows, weight, bias).unflatten(0, x.shape[:-1])


def outer(a: Float[Tensor, "N O"], b: Float[Tensor, "N I"]) -> Float[Tensor, "O I"]:
    """``a^T b``. oneDNN reads its second operand as it lies, and had better do so with the wider one."""
    if not suits(a.t(), b.t()) or not _takes("outer", a.shape[1] * b.numel()):
        return a.t() @ b
    if a.shape[1] <= b.shape[1]:
        return _Linear.apply(a.t(), b.t(), None)
    return _Linear.apply(b.t(), a.t(), None).t()


def suits(x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"]) -> bool:
    """Whether the product, or one of its gradients, is one for oneDNN."""
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
    """While active, `linear` takes the place of the linear layers of any model, GPT-2's ``Conv1D`` included."""

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
    """The matrix, or a copy of it, such that it or its transpose is contiguous."""
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
