"""A causal LM that reads a rollout as one row without padding, and each distinct prompt once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from policylab.data.rollout import Rollout
from policylab.functional.masks import length_mask
from policylab.functional.ragged import on_device
from policylab.models.readers.packing import CannotPackError, Packing, replaces_attention
from policylab.models.readers.padded import Layout, PaddedCausal


class PackedCausal(PaddedCausal):
    """Only attention needs to know which tokens belong together (`policylab.models.readers.packing`)."""

    packs = True

    @staticmethod
    @torch.no_grad()
    def reads(model: Any) -> bool:
        """Tries whether a model gives the same result for a packed row as for separate rows.

        False for attention that transformers cannot replace (recurrent models, or a configured fused kernel), for
        attention that `policylab.models.readers.packing` does not support (a sliding window), and for convolutions
        over tokens.
        """
        if not replaces_attention(model):
            return False
        if any(isinstance(module, nn.Conv1d) for module in model.modules()):  # it would mix sequences
            return False
        rollout = trial_rollout(model)
        padded, packed = PaddedCausal.lay_out(rollout), PackedCausal.lay_out(rollout)
        try:
            ours = packed.at_actions(packed.through(model)[0]).float()
        except CannotPackError:
            return False
        theirs = padded.at_actions(padded.through(model)[0]).float()
        tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
        return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())

    @staticmethod
    def lay_out(rollout: Rollout) -> Layout:
        """Each distinct prompt, then each completion without its last token, whose logits are not needed.

        Positions are computed on the CPU, with one copy from the device and two back, because each read from a GPU
        waits for all queued work.
        """
        width, device = rollout.tokens.shape[1], rollout.tokens.device
        fields = (rollout.lengths[:, None], rollout.tokens, rollout.action_mask)
        table = torch.cat([*fields, rollout.prompt_lengths[:, None], rollout.prompt_tokens], dim=1).cpu()
        length, written, is_action, keys = table.split(
            [1, width, width, table.shape[1] - 1 - 2 * width], dim=1
        )
        distinct, prompt_of = torch.unique(keys, dim=0, return_inverse=True)
        prompt_lengths, prompts = distinct[:, 0], distinct[:, 1:]
        lengths = length[:, 0] - 1
        packing = Packing.of(prompt_lengths, prompt_of, lengths, device)
        is_prompt = length_mask(prompt_lengths, prompts.shape[1])
        is_input = length_mask(lengths, packing.completions.width)
        prompt_places = torch.arange(prompts.shape[1]).expand_as(is_prompt)
        places = torch.arange(is_input.shape[1]) + prompt_lengths[prompt_of][:, None]
        # the first action's logits are at the prompt's last token, those of each other action at the token before it
        before_first = (prompt_lengths.cumsum(0) - 1)[prompt_of]
        first_input = packing.prompts.count + lengths.cumsum(0) - lengths
        steps = torch.arange(width)
        chosen_at = torch.where(steps == 0, before_first[:, None], first_input[:, None] + steps - 1)
        tokens = torch.cat([prompts[is_prompt.flip(-1)], written[:, : is_input.shape[1]][is_input]])
        positions = torch.cat([prompt_places[is_prompt], places[is_input]])
        chosen_at, actions = chosen_at[is_action.bool()], written[is_action.bool()]
        row = [F.pad(x, (0, packing.filler))[None] for x in (tokens, positions)]
        tokens, positions, chosen_at, actions = on_device([*row, chosen_at, actions], device)
        return Layout(tokens, positions, None, packing, chosen_at, actions)


def trial_rollout(model: Any) -> Rollout:
    """A small rollout for trying a model: three completions of different lengths, of two prompts."""
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
