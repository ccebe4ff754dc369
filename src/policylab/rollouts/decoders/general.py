"""Any causal LM of transformers, through its own forward pass and cache."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from policylab.functional.masks import length_mask
from policylab.models.head import watch_head


class GeneralDecoder:
    """The slower path, for whatever architecture: attention masks and Python between the kernels at each step."""

    logits: Float[Tensor, "B V"]
    hidden: Float[Tensor, "B H"]

    def __init__(self, lm: Any) -> None:
        self.lm = lm

    def prefill(
        self, tokens: Int[Tensor, "N P"], lengths: Int[Tensor, " N"], prompt_of: Int[Tensor, " B"], room: int
    ) -> None:
        self.cache = DynamicCache(config=self.lm.config)
        self.attention = length_mask(lengths, tokens.shape[1]).flip(-1)
        self._forward(tokens, (self.attention.cumsum(-1) - 1).clamp(min=0))
        if len(prompt_of) > len(tokens) or not torch.equal(
            prompt_of, torch.arange(len(tokens)).to(prompt_of)
        ):
            self.keep(prompt_of)
            self.logits, self.hidden = self.logits[prompt_of], self.hidden[prompt_of]

    def step(self, tokens: Int[Tensor, " B"]) -> None:
        positions = self.attention.sum(-1, keepdim=True)
        self.attention = torch.cat([self.attention, torch.ones_like(self.attention[:, :1])], dim=1)
        self._forward(tokens[:, None], positions)

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        self.cache.batch_select_indices(rows)
        self.attention = self.attention[rows]

    def _forward(self, tokens: Int[Tensor, "B S"], positions: Int[Tensor, "B S"]) -> None:
        with watch_head(self.lm) as seen:
            out = self.lm(
                input_ids=tokens,
                attention_mask=self.attention.long(),
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        assert seen.hidden is not None
        self.logits = out.logits[:, -1]
        self.hidden = seen.hidden[:, -1]
