"""Linear layers for decoding, by the fastest kernel available.

On a CPU, oneDNN has its own layout of weights, to which they are packed once per rollout, and it fuses a product with
the activation or residual after it. Its operators are private to PyTorch, so they are tried once; if they fail, the
plain product is used. In fp32 they are used for the classes of products that `policylab.functional.products` assigns
to oneDNN.
"""

from __future__ import annotations

import functools
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from policylab.functional.products import packs

Activation = Literal["gelu", "swish"]


class Linear:
    """``x @ weight.T + bias``, with an optional activation or residual.

    Args:
        weight: ``[out, in]``, with any strides.
        dtype: dtype of the product; other weights are cast once, here.
        then: activation of the product: tanh GELU ("gelu"), or SiLU ("swish").
    """

    def __init__(
        self,
        weight: Float[Tensor, "O I"],
        bias: Float[Tensor, " O"] | None,
        dtype: torch.dtype,
        then: Activation | None = None,
    ):
        self.weight, self.then = weight.detach().to(dtype), then
        self.bias = None if bias is None else bias.detach().to(dtype).contiguous()
        on_cpu, fp32 = weight.device.type == "cpu", dtype == torch.float32
        wanted = not fp32 or packs(weight.numel(), activated=then is not None)
        self.packed = on_cpu and wanted and onednn_works(dtype)
        if self.packed:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.contiguous())
        elif on_cpu and fp32:
            self.weight = self.weight.t().contiguous().t()  # with few rows, MKL is faster in this layout

    def __call__(self, x: Float[Tensor, "B I"]) -> Float[Tensor, "B O"]:
        """The product with its activation."""
        x = x.to(self.weight.dtype)
        if self.packed:
            algorithm = "tanh" if self.then == "gelu" else ""
            return torch.ops.mkldnn._linear_pointwise(
                x, self.weight, self.bias, self.then or "none", [], algorithm
            )
        return _activated(F.linear(x, self.weight, self.bias), self.then)

    def onto(self, x: Float[Tensor, "B I"], residual: Float[Tensor, "B O"]) -> Float[Tensor, "B O"]:
        """The product added to the residual stream, which stays in fp32."""
        if self.packed and self.weight.dtype == residual.dtype:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return residual + self(x)


def _activated(product: Tensor, then: Activation | None) -> Tensor:
    if then is None:
        return product
    return F.gelu(product, approximate="tanh") if then == "gelu" else F.silu(product)


@functools.cache
def onednn_works(dtype: torch.dtype) -> bool:
    """Whether this build of PyTorch has oneDNN's fused linears for a dtype, and they agree with plain ones."""
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
    except (AttributeError, NotImplementedError, RuntimeError):  # not in this build, or not on this processor
        return False
    plain = [product, _activated(product, "gelu"), _activated(product, "swish"), residual + product]
    close = 1e-5 if dtype == torch.float32 else 0.05
    return all(torch.allclose(a, b, rtol=close, atol=close) for a, b in zip(found, plain, strict=True))
