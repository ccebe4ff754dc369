"""Layers of a Hugging Face model compiled by torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from policylab.models.layers import decoder_layers

#: How often torch recompiles a function before it runs it uncompiled. The default of 8 is reached in a few passes,
#: because all products go through one function (`policylab.functional.products.FastProducts`).
RECOMPILE_LIMIT = 64


def compile_layers(lm: nn.Module, trial: Callable[[], Tensor]) -> str | None:
    """Compiles each decoder layer with torch, and tries it.

    Args:
        trial: computes a scalar with the layers as in training, on the device where they will run.

    Returns:
        None, or one line that says why it failed; the model is then unchanged.
    """
    layers = list[nn.Module]()
    try:
        layers += decoder_layers(lm)
        torch._dynamo.config.recompile_limit = max(RECOMPILE_LIMIT, torch._dynamo.config.recompile_limit)
        for layer in layers:
            layer.compile(dynamic=True)
        with torch.enable_grad():
            trial().backward()
    except Exception as error:  # any exception of a missing compiler, or of one that cannot compile the model
        for layer in layers:
            layer._compiled_call_impl = None
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    finally:
        lm.zero_grad(set_to_none=True)
    return None
