"""Decoding with any causal LM of transformers, through its own forward pass and cache."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from policylab.errors import UserError
from policylab.functional.masks import length_mask
from policylab.models.watch import watch_head


class GeneralDecoder:
    """The slower path, for any architecture: it needs attention masks, and much Python code per step."""

    logits: Float[Tensor, "B V"]
    hidden: Float[Tensor, "B H"]

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        # transformers renames this argument in 5.24 and removes the old name in 5.40.
        names = inspect.signature(lm.forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"

    def prefill(
        self, tokens: Int[Tensor, "N P"], lengths: Int[Tensor, " N"], prompt_of: Int[Tensor, " B"], room: int
    ) -> None:
        self.cache = DynamicCache(config=self.lm.config)
        self.attention = length_mask(lengths, tokens.shape[1]).flip(-1)
        self._forward(tokens, self.attention, (self.attention.cumsum(-1) - 1).clamp(min=0))
        if any(map(_unused, self.cache.layers)):
            raise UserError(
                f"rollout=cached cannot decode {type(self.lm).__name__}, which keeps its state outside the cache; "
                "take rollout=generate"
            )
        self.attends = any(isinstance(layer, CacheLayerMixin) for layer in self.cache.layers)
        if len(prompt_of) > len(tokens) or not torch.equal(
            prompt_of, torch.arange(len(tokens)).to(prompt_of)
        ):
            self.keep(prompt_of)
            self.logits, self.hidden = self.logits[prompt_of], self.hidden[prompt_of]

    def step(self, tokens: Int[Tensor, " B"]) -> None:
        positions = self.attention.sum(-1, keepdim=True)
        self.attention = torch.cat([self.attention, torch.ones_like(self.attention[:, :1])], dim=1)
        # a recurrent model would apply the mask to the single token
        self._forward(tokens[:, None], self.attention if self.attends else None, positions)

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        with self._named():
            self.cache.reorder_cache(rows)  # type: ignore[arg-type]
        self.attention = self.attention[rows]

    def _forward(
        self, tokens: Int[Tensor, "B S"], attention: Bool[Tensor, "B C"] | None, positions: Int[Tensor, "B S"]
    ) -> None:
        with watch_head(self.lm) as seen, self._named():
            out = self.lm(
                input_ids=tokens,
                attention_mask=None if attention is None else attention.long(),
                position_ids=positions,
                use_cache=True,
                logits_to_keep=1,
                **{self.cache_name: self.cache},
            )
        assert seen.hidden is not None
        self.logits = out.logits[:, -1]
        self.hidden = seen.hidden[:, -1]

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Turns the error of a model that cannot be decoded into one that names an alternative."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # any exception of an architecture that does not support this cache
            raise UserError(
                f"rollout=cached cannot decode {type(self.lm).__name__} with transformers' cache "
                f"({type(error).__name__}: {str(error).strip().partition(chr(10))[0]}); take rollout=generate"
            ) from error


def _unused(layer: Any) -> bool:
    """Whether a recurrent layer has stored nothing in the cache."""
    states = [getattr(layer, f"is_{kind}_states_initialized", None) for kind in ("conv", "recurrent")]
    return states[0] is not None and not any(any(kind.values()) for kind in states if kind)
