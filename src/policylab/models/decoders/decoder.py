"""What the decode loop asks of a model.

Axes: ``N`` distinct prompts, ``P`` prompt length, ``B`` rows that are being written, ``V`` vocabulary, ``H`` the
width that the LM head reads.
"""

from __future__ import annotations

from typing import Protocol

from jaxtyping import Float, Int
from torch import Tensor


class Decoder(Protocol):
    """A model that continues many rows, a token each at a time. One object serves one rollout.

    What it keeps between tokens (keys and values, or a recurrent state) is internal to it.
    """

    @property
    def logits(self) -> Float[Tensor, "B V"]:
        """Of each row's next token."""
        ...

    @property
    def hidden(self) -> Float[Tensor, "B H"]:
        """What the LM head made the logits from: a critic on the policy's trunk reads it."""
        ...

    def prefill(
        self, tokens: Int[Tensor, "N P"], lengths: Int[Tensor, " N"], prompt_of: Int[Tensor, " B"], room: int
    ) -> None:
        """Reads each prompt once, with the weights as they are now. Row ``b`` will continue ``prompt_of[b]``.

        Args:
            tokens: left-padded.
            room: tokens that may follow at most.
        """
        ...

    def step(self, tokens: Int[Tensor, " B"]) -> None:
        """Appends one token to each row."""
        ...

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Drops all other rows: what was row ``rows[k]`` is now row ``k``. Logits and hidden state are not updated."""
        ...
