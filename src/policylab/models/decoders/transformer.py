"""Fast decoding with transformers that are reimplemented in this package.

An architecture is a `Network`: the weights of a Hugging Face model, and its forward pass over tokens in rows.
Attention is in the cache, so prompts and single tokens use the same code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from policylab.functional.masks import length_mask
from policylab.models.decoders.cache import SharedPromptCache

#: Attention of one layer: from its number, queries, keys and values of ``R`` tokens to its output.
Attend = Callable[[int, Float[Tensor, "R KQ D"], Float[Tensor, "R 2 K D"]], Float[Tensor, "R H"]]


class Network(Protocol):
    """A snapshot of a transformer's weights, and its forward pass."""

    copies_qkv: ClassVar[bool]  #: whether it copies the weights of queries, keys and values

    def __init__(self, lm: Any, dtype: torch.dtype) -> None: ...

    @staticmethod
    def reads(lm: nn.Module) -> bool:
        """Whether it implements this model."""
        ...

    def cache(self) -> SharedPromptCache:
        """An empty cache of the right shape."""
        ...

    def hidden(
        self, tokens: Int[Tensor, " R"], positions: Int[Tensor, " R"], attend: Attend
    ) -> Float[Tensor, "R H"]:
        """The LM head's input."""
        ...

    def logits(self, hidden: Float[Tensor, "R H"]) -> Float[Tensor, "R V"]:
        """Logits by the LM head."""
        ...


class TransformerDecoder:
    """A `policylab.models.decoders.Decoder` over a `Network`."""

    logits: Float[Tensor, "B V"]
    hidden: Float[Tensor, "B H"]

    def __init__(self, network: Network) -> None:
        self.network = network

    def prefill(
        self, tokens: Int[Tensor, "N P"], lengths: Int[Tensor, " N"], prompt_of: Int[Tensor, " B"], room: int
    ) -> None:
        self.cache = self.network.cache()
        self.cache.open(lengths, prompt_of, room)
        real = length_mask(lengths, tokens.shape[1])
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)[real]
        with _as_written(tokens):
            hidden = self.network.hidden(tokens[real.flip(-1)], positions, self.cache.read_prompt)
            self.hidden = hidden[lengths.cumsum(0) - 1]
            self.logits = self.network.logits(self.hidden)[prompt_of]
        self.hidden = self.hidden[prompt_of]
        self.positions = lengths[prompt_of]

    def step(self, tokens: Int[Tensor, " B"]) -> None:
        with _as_written(tokens):
            self.hidden = self.network.hidden(tokens, self.positions, self.cache.read_token)
            self.logits = self.network.logits(self.hidden)
        self.cache.written += 1
        self.positions = self.positions + 1

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        self.cache.keep(rows)
        self.positions = self.positions[rows]


def _as_written(x: Tensor) -> torch.autocast:
    """Disables autocast: the network has its own dtypes, and casts weights once, not at each step."""
    return torch.autocast(x.device.type, enabled=False)
