"""A rollout as a model reads it: prompt and completion in one row.

Axes: ``B`` sequences, ``S`` positions of prompt and completion, ``T`` sampled positions, ``N`` actions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from policylab.functional.logprobs import completion_slice
from policylab.functional.masks import length_mask
from policylab.rollouts.types import Rollout


@dataclass(frozen=True)
class Sequences:
    """Rows of tokens with padding on both sides, and the positions whose outputs chose an action."""

    tokens: Int[Tensor, "B S"]
    attention: Bool[Tensor, "B S"]  #: false at padding
    chosen_at: Bool[Tensor, "B S"]  #: one true position for each action: the one before it

    @classmethod
    def of(cls, rollout: Rollout) -> Self:
        """Prompt and completion side by side."""
        prompt_width, width = rollout.prompt_tokens.shape[1], rollout.tokens.shape[1]
        prompt_mask = length_mask(rollout.prompt_lengths, prompt_width).flip(-1)
        attention = torch.cat([prompt_mask, length_mask(rollout.lengths, width)], dim=1)
        chosen_at = torch.zeros_like(attention)
        chosen_at[:, completion_slice(prompt_width, width)] = rollout.action_mask
        return cls(torch.cat([rollout.prompt_tokens, rollout.tokens], dim=1), attention, chosen_at)

    def through(self, model: nn.Module) -> Any:
        """What a Hugging Face model says to them, without a cache."""
        return model(
            input_ids=self.tokens,
            attention_mask=self.attention.long(),
            position_ids=(self.attention.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        )


def on_grid(x: Float[Tensor, " N"], rollout: Rollout) -> Float[Tensor, "B T"]:
    """Figures of the actions, in row-major order, at their places; zero elsewhere."""
    return x.new_zeros(rollout.action_mask.shape).masked_scatter(rollout.action_mask, x)
