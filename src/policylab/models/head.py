"""Access to the LM head of any Hugging Face causal LM, through its own forward pass.

A hook on the head sees the last hidden states and may narrow them to the positions of interest before
the (large) head runs. Whatever the architecture does to its logits afterwards still happens, so the
result equals the full forward at those positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor, nn


@dataclass
class HeadInput:
    """The hidden states that went into the LM head: ``[1, N, H]`` when narrowed, else ``[B, S, H]``."""

    hidden: Tensor | None = None


@contextmanager
def watch_head(
    lm: nn.Module, positions: Bool[Tensor, "B S"] | None = None, *, run: bool = True
) -> Iterator[HeadInput]:
    """While active, records the head's input and, given ``positions``, runs the head on those alone.

    Args:
        lm: a causal LM with ``get_output_embeddings()``.
        positions: true where logits are wanted; the model then returns logits ``[1, N, V]`` in row-major
            order of the true positions.
        run: False hands the head nothing, for whom the hidden states are enough.
    """
    seen = HeadInput()

    def narrow(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0] if positions is None else inputs[0][positions][None]
        seen.hidden = hidden
        return (hidden if run else hidden[:, :0],)

    handle = lm.get_output_embeddings().register_forward_pre_hook(narrow)  # type: ignore[operator]
    try:
        yield seen
    finally:
        handle.remove()
