"""Causal LMs of transformers, through their own forward pass.

Axes: ``R`` rows and ``S`` positions of the model's input, ``N`` actions, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from policylab.data.rollout import Rollout
from policylab.errors import UserError
from policylab.functional.logprobs import completion_slice
from policylab.functional.masks import length_mask
from policylab.functional.products import FastProducts, replaces_layers
from policylab.models.decoders import Decoder, decoder_for
from policylab.models.readers.packing import REPLACED, Packing, packed, rows_of
from policylab.models.readers.reader import Pass
from policylab.models.recompute import recomputed_layers
from policylab.models.shape import Shape, attention_of, context_of, shape_of
from policylab.models.watch import is_linear, watch_head, watch_layers


@dataclass(frozen=True)
class Layout:
    """A rollout as a model reads it."""

    tokens: Int[Tensor, "R S"]
    positions: Int[Tensor, "R S"]
    attention: Bool[Tensor, "R S"] | None  #: false at padding; None without any
    packing: Packing | None  #: layout of a packed row; None for separate rows
    #: flat position of the token before each action, in order of the action mask
    chosen_at: Int[Tensor, " N"]
    actions: Int[Tensor, " N"]  #: the tokens chosen there

    def through(self, model: nn.Module) -> Any:
        """The output of a Hugging Face model, without a cache."""
        with self.reading(model.config):
            return model(
                input_ids=self.tokens,
                attention_mask=None if self.attention is None else self.attention.long(),
                position_ids=self.positions,
                use_cache=False,
            )

    @contextmanager
    def reading(self, config: Any) -> Iterator[None]:
        """While active, layers with this config use the packing's attention and the fast products."""
        with (
            nullcontext() if self.packing is None else packed(config, self.packing),
            FastProducts() if self.tokens.device.type == "cpu" and replaces_layers() else nullcontext(),
        ):
            yield

    def at_actions(self, x: Float[Tensor, "R S H"]) -> Float[Tensor, "N H"]:
        """The hidden state before each action."""
        return rows_of(x.flatten(0, 1), self.chosen_at)


class PaddedCausal:
    """A `policylab.models.readers.Reader` with one row per sequence: the left-padded prompt, then the completion.

    Args:
        lm: a causal LM, with or without an LM head (a critic has none).
    """

    packs: ClassVar[bool] = False

    def __init__(self, lm: Any) -> None:
        self.lm = lm
        self.linear_head = is_linear(lm)

    @staticmethod
    def reads(model: Any) -> bool:
        """Every causal LM."""
        return True

    @staticmethod
    def lay_out(rollout: Rollout) -> Layout:
        """The rollout as the model reads it."""
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

    @property
    def context(self) -> int | None:
        return context_of(self.lm)

    def shape(self) -> Shape:
        return shape_of(self.lm)

    def head(self) -> nn.Linear | None:
        head: nn.Linear = self.lm.get_output_embeddings()
        return head if self.linear_head else None

    def read(
        self, rollout: Rollout, *, logits: bool, watch: Sequence[nn.Module] = (), recompute: bool = False
    ) -> Pass:
        layout = self.lay_out(rollout)
        again = partial(layout.reading, self.lm.config)
        with (
            watch_head(self.lm, layout.at_actions, run=logits) as seen,
            watch_layers(watch) as calls,
            recomputed_layers(self.lm, again) if recompute else nullcontext(),
        ):
            found = layout.through(self.lm).logits
        assert seen.hidden is not None
        return Pass(seen.hidden[0], found[0], layout.actions, calls, again, layout.at_actions)

    def hidden_at_actions(self, rollout: Rollout) -> Float[Tensor, "N H"]:
        layout = self.lay_out(rollout)
        return layout.at_actions(layout.through(self.lm).last_hidden_state)

    def decoder(self, dtype: torch.dtype) -> Decoder:
        return decoder_for(self.lm, dtype)

    def make_differentiable(self) -> None:
        if self.lm._can_set_experts_implementation():  # grouped products lack a forward-mode derivative
            self.lm.set_experts_implementation("eager")
        attention = attention_of(self.lm)
        if attention not in REPLACED:
            raise UserError(
                f"algo.update=trust_region needs derivatives that {attention} attention does not have; take "
                f"model.attn_implementation={' or '.join(REPLACED)}"
            )
