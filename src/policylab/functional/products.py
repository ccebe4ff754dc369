"""fp32 products of matrices on a CPU, by the faster of the two libraries that PyTorch carries.

PyTorch multiplies fp32 matrices with MKL, which uses half of what an AMD core can do; oneDNN, which PyTorch has for
other precisions, does not care who made the processor. Its operator is private to PyTorch, so it is tried once, and
where it fails the plain product takes over. Sums are taken in another order, so results differ by rounding.

Axes: ``N`` rows, ``I`` and ``O`` what goes in and comes out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

#: Multiply-adds from which oneDNN, slow to call, is the faster one.
WORTH_A_CALL = 2**21


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


def suits(x: Float[Tensor, "N I"], weight: Float[Tensor, "O I"]) -> bool:
    """Whether the product is one for oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and len(x) * weight.numel() >= WORTH_A_CALL
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


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _onednn(x, weight, bias)

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
            _outer(slope, x) if wants_weight else None,
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


def _outer(a: Float[Tensor, "N O"], b: Float[Tensor, "N I"]) -> Float[Tensor, "O I"]:
    """``a^T b``. oneDNN reads its second operand as it lies, and had better do so with the wider one."""
    if a.shape[1] <= b.shape[1]:
        return linear(a.t(), b.t(), None)
    return linear(b.t(), a.t(), None).t()
