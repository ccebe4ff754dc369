"""A causal LM that reads each prompt with its completion in a row of its own."""

from __future__ import annotations

from typing import Any

import torch

from policylab.data.rollout import Rollout
from policylab.functional.logprobs import completion_slice
from policylab.functional.masks import length_mask
from policylab.models.readers.causal import Causal, Layout


class PaddedCausal(Causal):
    """Prompts are padded in front, completions behind. Right for every causal LM of transformers."""

    packs = False

    @staticmethod
    def reads(model: Any) -> bool:
        """Every causal LM."""
        return True

    @staticmethod
    def lay_out(rollout: Rollout) -> Layout:
        prompt_width, width = rollout.prompt_tokens.shape[1], rollout.tokens.shape[1]
        prompt_mask = length_mask(rollout.prompt_lengths, prompt_width).flip(-1)
        attention = torch.cat([prompt_mask, length_mask(rollout.lengths, width)], dim=1)
        places = torch.arange(attention.numel(), device=attention.device).view(attention.shape)
        at = rollout.action_mask.flatten().nonzero().squeeze(-1)
        return Layout(
            tokens=torch.cat([rollout.prompt_tokens, rollout.tokens], dim=1),
            positions=(attention.cumsum(-1) - 1).clamp(min=0),
            attention=attention,
            packing=None,
            chosen_at=places[:, completion_slice(prompt_width, width)].flatten()[at],
            actions=rollout.tokens.flatten()[at],
        )
