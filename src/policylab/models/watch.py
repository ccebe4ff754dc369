"""Records the inputs of the LM head and the layers of a Hugging Face model, by hooks on its own forward pass.

Works for any architecture; operations on the logits after the head still happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


@dataclass
class HeadInput:
    """The input of the LM head: ``[1, N, H]`` when narrowed, else ``[B, S, H]``."""

    hidden: Tensor | None = None


@contextmanager
def watch_head(
    lm: nn.Module, narrow: Callable[[Tensor], Tensor] | None = None, *, run: bool = True
) -> Iterator[HeadInput]:
    """While active, records the head's input, and can run the head on a part of it only.

    Args:
        lm: a causal LM with ``get_output_embeddings()``.
        narrow: selects from hidden states ``[B, S, H]`` those ``[N, H]`` that need logits; the model then returns
            logits ``[1, N, V]``.
        run: False skips the head, when only the hidden states are needed.
    """
    seen = HeadInput()

    def before(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0] if narrow is None else narrow(inputs[0])[None]
        seen.hidden = hidden
        return (hidden if run else hidden[:, :0],)

    handle = lm.get_output_embeddings().register_forward_pre_hook(before)  # type: ignore[operator]
    try:
        yield seen
    finally:
        handle.remove()


@dataclass(frozen=True)
class LayerCall:
    """The arguments of a model's call to one of its layers; the first is the hidden state."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def hidden(self) -> Float[Tensor, "B S H"]:
        """The hidden state that the layer read, without gradient."""
        return (self.args[0] if self.args else self.kwargs["hidden_states"]).detach()

    def repeat(self, layer: nn.Module, hidden: Float[Tensor, "B S H"]) -> Float[Tensor, "B S H"]:
        """Calls another layer with these arguments and another hidden state; the model gets no gradient."""
        if self.args:
            out = layer(hidden, *_detached(self.args[1:]), **_detached(self.kwargs))
        else:
            out = layer(**{**_detached(self.kwargs), "hidden_states": hidden})
        return out[0] if isinstance(out, tuple) else out


@contextmanager
def watch_layers(layers: Sequence[nn.Module]) -> Iterator[list[LayerCall]]:
    """While active, collects the calls of the given layers."""
    calls: list[LayerCall] = []

    def collect(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(LayerCall(args, kwargs))

    handles = [layer.register_forward_pre_hook(collect, with_kwargs=True) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def probe(
    lm: nn.Module, layers: Sequence[nn.Module] = ()
) -> tuple[Float[Tensor, "S H"], Sequence[LayerCall]]:
    """A forward pass over a few tokens: the LM head's input, and the calls of the given layers."""
    device = next(lm.parameters()).device
    tokens = torch.arange(4, device=device)[None] % lm.get_input_embeddings().num_embeddings  # type: ignore[operator]
    with watch_head(lm) as seen, watch_layers(layers) as calls:
        lm(input_ids=tokens, use_cache=False)
    assert seen.hidden is not None
    return seen.hidden[0], calls


@torch.no_grad()
def is_linear(lm: Any) -> bool:
    """Whether the logits are a linear map of the hidden states: a linear head, and no operation on its output."""
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:  # or none, in a model without a head
        return False
    tokens = torch.arange(4, device=head.weight.device)[None] % lm.get_input_embeddings().num_embeddings
    with watch_head(lm) as seen:
        logits = lm(input_ids=tokens, use_cache=False).logits
    assert seen.hidden is not None
    expected = nn.functional.linear(seen.hidden, head.weight, head.bias)
    return logits.dtype == expected.dtype and torch.equal(logits, expected)


def _detached(x: Any) -> Any:
    """The same arguments without gradient."""
    if isinstance(x, Tensor):
        return x.detach()
    if type(x) in (tuple, list):
        return type(x)(_detached(item) for item in x)
    if type(x) is dict:
        return {name: _detached(item) for name, item in x.items()}
    return x
