"""The interface between a model and the decode loop.

Axes: ``N`` distinct prompts, ``P`` prompt length, ``B`` unfinished rows, ``V`` vocabulary, ``H`` size of the LM head's
input.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor


class Decoder(Protocol):
    """A model that continues many rows, one token per row and step. One object serves one rollout.

    Its state between tokens (keys and values, or a recurrent state) is internal.
    """

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """Logits of each row's next token."""
        ...

    @property
    def hidden(self) -> Float[Tensor, "B H"]:
        """The LM head's input for these logits, which a critic on the policy's trunk reads too."""
        ...

    def prefill(
        self, tokens: Int[Tensor, "N P"], lengths: Int[Tensor, " N"], prompt_of: Int[Tensor, " B"], room: int
    ) -> None:
        """Reads each prompt once, with the current weights. Row ``b`` will continue ``prompt_of[b]``.

        Args:
            tokens: left-padded.
            room: most new tokens per row.
        """
        ...

    def step(self, tokens: Int[Tensor, " B"]) -> None:
        """Appends one token to each row."""
        ...

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Keeps only these rows: row ``rows[k]`` becomes row ``k``. Logits and hidden state are not updated."""
        ...
