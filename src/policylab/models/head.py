"""Access to the LM head of any Hugging Face causal LM, through its own forward pass.

A hook on the head sees the last hidden states and may narrow them to the positions of interest before
the (large) head runs. Whatever the architecture does to its logits afterwards still happens, so the
result equals the full forward at those positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class HeadInput:
    """The hidden states that went into the LM head: ``[1, N, H]`` when narrowed, else ``[B, S, H]``."""

    hidden: Tensor | None = None


@contextmanager
def watch_head(
    lm: nn.Module, narrow: Callable[[Tensor], Tensor] | None = None, *, run: bool = True
) -> Iterator[HeadInput]:
    """While active, records the head's input and may run the head on a part of it alone.

    Args:
        lm: a causal LM with ``get_output_embeddings()``.
        narrow: takes hidden states ``[B, S, H]`` to the ``[N, H]`` for which logits are wanted; the model then
            returns logits ``[1, N, V]``.
        run: False hands the head nothing, for whom the hidden states are enough.
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


@torch.no_grad()
def is_linear(lm: Any) -> bool:
    """Whether logits are the LM head's linear map of the hidden states, and nothing is done to them afterwards."""
    head = lm.get_output_embeddings()
    if type(head) is not nn.Linear:  # or none, in a model without a head
        return False
    tokens = torch.arange(4, device=head.weight.device)[None] % lm.get_input_embeddings().num_embeddings
    with watch_head(lm) as seen:
        logits = lm(input_ids=tokens, use_cache=False).logits
    assert seen.hidden is not None
    expected = nn.functional.linear(seen.hidden, head.weight, head.bias)
    return logits.dtype == expected.dtype and torch.equal(logits, expected)
