"""Gradient checkpointing of the layers of a Hugging Face model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from policylab.models.layers import decoder_layers


@contextmanager
def recomputed_layers(lm: nn.Module, context: Callable[[], AbstractContextManager[None]]) -> Iterator[None]:
    """While active, each layer keeps only its input, and is recomputed in the backward pass.

    "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174: about a third more arithmetic, for the memory of
    one layer instead of all.

    Args:
        context: creates the context in which a layer is recomputed.

    Raises:
        UserError: when the model's layers cannot be found.
    """
    layers = decoder_layers(lm)
    for layer in layers:
        layer.forward = functools.partial(
            checkpoint,
            layer.forward,
            use_reentrant=False,
            context_fn=lambda: (nullcontext(), _Reentrant(context)),
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


class _Reentrant(AbstractContextManager[None]):
    """A context that can be entered many times: each backward pass over a retained graph recomputes the layer."""

    def __init__(self, make: Callable[[], AbstractContextManager[None]]) -> None:
        self._make = make
        self._entered = list[AbstractContextManager[None]]()

    def __enter__(self) -> None:
        self._entered.append(self._make())
        self._entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)
