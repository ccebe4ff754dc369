"""A few tokens to try a model with."""

from __future__ import annotations

from typing import Any

import torch

from policylab.data.rollout import Rollout
from policylab.functional.masks import length_mask


def trial_rollout(model: Any) -> Rollout:
    """Three completions of unequal lengths, of two prompts, on the model's device."""
    device = next(model.parameters()).device
    grid = (torch.arange(9, device=device) % model.get_input_embeddings().num_embeddings).view(3, 3)
    rows = torch.tensor([0, 1, 0], device=device)
    lengths = torch.tensor([3, 1, 2], device=device)
    return Rollout(
        prompt_tokens=grid[rows],
        prompt_lengths=torch.tensor([1, 3], device=device)[rows],
        tokens=grid,
        lengths=lengths,
        action_mask=length_mask(lengths, 3),
        ended=lengths < 3,
        group_ids=rows,
        prompt_ids=rows,
        logprobs=torch.zeros(3, 3, device=device),
    )
