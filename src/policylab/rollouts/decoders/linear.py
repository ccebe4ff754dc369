"""Linear layers for decoding, by the fastest kernel that is there.

On a CPU that is oneDNN (`policylab.functional.products` says why): it takes weights in a layout of its own, into which
they are packed once a rollout, and fuses what follows a product (activation, residual). Its operators are private to
PyTorch, so they are tried once, and where they fail the plain product takes over.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Activation = Literal["gelu", "swish"]


class Linear:
    """``x @ weight.T + bias`` and what may follow it.

    Args:
        weight: ``[out, in]``, of whatever strides.
        dtype: of the product; another than the weight's own is cast to once, here.
    """

    def __init__(self, weight: Float[Tensor, "O I"], bias: Float[Tensor, " O"] | None, dtype: torch.dtype):
        self.weight = weight.detach().to(dtype)
        self.bias = None if bias is None else bias.detach().to(dtype)
        self.onednn = weight.device.type == "cpu" and onednn_works(dtype)
        if self.onednn:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())

    def __call__(self, x: Float[Tensor, "B I"], then: Activation | None = None) -> Float[Tensor, "B O"]:
        """The product, and the activation of it: GELU by tanh ("gelu"), or SiLU ("swish")."""
        x = x.to(self.weight.dtype)
        if self.onednn:
            algorithm = "tanh" if then == "gelu" else ""
            return torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, then or "none", [], algorithm
            )
        product = F.linear(x, self.weight, self.bias)
        if then is None:
            return product
        return F.gelu(product, approximate="tanh") if then == "gelu" else F.silu(product)

    def onto(self, x: Float[Tensor, "B I"], residual: Float[Tensor, "B O"]) -> Float[Tensor, "B O"]:
        """The product added to the residual stream, which stays in fp32."""
        if self.onednn and self.weight.dtype == residual.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return residual + self(x)


@functools.cache
def onednn_works(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has oneDNN's fused linears for a dtype, and they say what plain ones say."""
    x, residual = torch.linspace(-1, 1, 64).view(4, 16).to(dtype), torch.ones(4, 8, dtype=dtype)
    weight, bias = torch.linspace(-1, 1, 128).view(8, 16).to(dtype), torch.linspace(-1, 1, 8).to(dtype)
    product = F.linear(x, weight, bias)
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)
        fused = torch.ops.mkldnn._linear_pointwise
        found = [
            fused(x, packed, bias, "none", [], ""),
            fused(x, packed, bias, "gelu", [], "tanh"),
            fused(x, packed, bias, "swish", [], ""),
            fused.binary(x, residual, packed, bias, "add"),
        ]
    except (AttributeError, NotImplementedError, RuntimeError):  # not built in, or not on this processor
        return False
    plain = [product, F.gelu(product, approximate="tanh"), F.silu(product), residual + product]
    close = 1e-5 if dtype == torch.float32 else 0.05
    return all(torch.allclose(a, b, rtol=close, atol=close) for a, b in zip(found, plain, strict=True))
