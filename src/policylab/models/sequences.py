"""A rollout as a model reads it: prompt and completion in one row, or all in one row without padding.

Axes: ``B`` sequences, ``T`` sampled positions, ``U`` distinct prompts, ``R`` rows and ``S`` positions of what the model
reads, ``N`` actions.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from policylab.data.rollout import Rollout
from policylab.functional.logprobs import completion_slice
from policylab.functional.masks import length_mask
from policylab.functional.products import FastProducts, replaces_layers
from policylab.functional.ragged import on_device
from policylab.models.packing import REPLACED, CannotPackError, Packing, packed, rows_of


@dataclass(frozen=True)
class Sequences:
    """Tokens, and the positions whose outputs chose an action."""

    rollout: Rollout
    tokens: Int[Tensor, "R S"]
    positions: Int[Tensor, "R S"]
    attention: Bool[Tensor, "R S"] | None  #: false at padding; None without any
    packing: Packing | None  #: how the one row is packed; None for a row each
    chosen_at: Int[Tensor, " N"]  #: flat position of the token before each action, in order of the mask
    actions: Int[Tensor, " N"]  #: the tokens chosen there

    @classmethod
    def of(cls, rollout: Rollout, *, packed: bool) -> Self:
        """The rollout in the form that suits a model (see `policylab.models.packing.can_pack`)."""
        return cls._packed(rollout) if packed else cls._padded(rollout)

    @classmethod
    def _padded(cls, rollout: Rollout) -> Self:
        prompt_width, width = rollout.prompt_tokens.shape[1], rollout.tokens.shape[1]
        prompt_mask = length_mask(rollout.prompt_lengths, prompt_width).flip(-1)
        attention = torch.cat([prompt_mask, length_mask(rollout.lengths, width)], dim=1)
        places = torch.arange(attention.numel(), device=attention.device).view(attention.shape)
        at = rollout.action_mask.flatten().nonzero().squeeze(-1)
        return cls(
            rollout=rollout,
            tokens=torch.cat([rollout.prompt_tokens, rollout.tokens], dim=1),
            positions=(attention.cumsum(-1) - 1).clamp(min=0),
            attention=attention,
            packing=None,
            chosen_at=places[:, completion_slice(prompt_width, width)].flatten()[at],
            actions=rollout.tokens.flatten()[at],
        )

    @classmethod
    def _packed(cls, rollout: Rollout) -> Self:
        """Each distinct prompt, then each completion but for its last token, which chooses nothing.

        What stands where is worked out on the CPU, for one copy to it and two back: each question to an accelerator
        would wait for all work under way.
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
        # The first action follows the prompt's last token, each other one the token before it.
        before_first = (prompt_lengths.cumsum(0) - 1)[prompt_of]
        first_input = packing.prompts.count + lengths.cumsum(0) - lengths
        steps = torch.arange(width)
        chosen_at = torch.where(steps == 0, before_first[:, None], first_input[:, None] + steps - 1)
        tokens = torch.cat([prompts[is_prompt.flip(-1)], written[:, : is_input.shape[1]][is_input]])
        positions = torch.cat([prompt_places[is_prompt], places[is_input]])
        chosen_at, actions = chosen_at[is_action.bool()], written[is_action.bool()]
        row = [F.pad(x, (0, packing.filler))[None] for x in (tokens, positions)]
        tokens, positions, chosen_at, actions = on_device([*row, chosen_at, actions], device)
        return cls(
            rollout=rollout,
            tokens=tokens,
            positions=positions,
            attention=None,
            packing=packing,
            chosen_at=chosen_at,
            actions=actions,
        )

    def through(self, model: nn.Module) -> Any:
        """What a Hugging Face model says to them, without a cache."""
        with self.read_by(model.config):
            return model(
                input_ids=self.tokens,
                attention_mask=None if self.attention is None else self.attention.long(),
                position_ids=self.positions,
                use_cache=False,
            )

    @contextmanager
    def read_by(self, config: Any) -> Iterator[None]:
        """While active, models with this config understand how the tokens are packed, and multiply fast."""
        with (
            nullcontext() if self.packing is None else packed(config, self.packing),
            FastProducts() if self.tokens.device.type == "cpu" and replaces_layers() else nullcontext(),
        ):
            yield

    def at_actions(self, x: Float[Tensor, "R S H"]) -> Float[Tensor, "N H"]:
        """The states that chose each action."""
        return rows_of(x.flatten(0, 1), self.chosen_at)


def on_grid(x: Float[Tensor, " N"], rollout: Rollout) -> Float[Tensor, "B T"]:
    """Figures of the actions, in row-major order, at their places; zero elsewhere."""
    return x.new_zeros(rollout.action_mask.shape).masked_scatter(rollout.action_mask, x)


@torch.no_grad()
def can_pack(model: Any) -> bool:
    """Whether a Hugging Face model gives the same for a packed row as for rows of their own: tried, not presumed.

    False for attention that transformers cannot replace (recurrent models, or a fused kernel that was asked for) or
    that does more than `policylab.models.packing` knows of (a sliding window), and for convolutions over tokens.
    """
    if model.config._attn_implementation not in REPLACED or not model._supports_attention_backend:
        return False
    if any(isinstance(module, nn.Conv1d) for module in model.modules()):  # it would see across rows
        return False
    trial = trial_rollout(model)
    rows_apart, one_row = (Sequences.of(trial, packed=packed) for packed in (False, True))
    try:
        ours = one_row.at_actions(one_row.through(model)[0]).float()
    except CannotPackError:
        return False
    theirs = rows_apart.at_actions(rows_apart.through(model)[0]).float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.1
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def trial_rollout(model: Any) -> Rollout:
    """A few tokens to try a model with: a prompt shared by two, lengths that differ."""
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
