"""Attention over a packed row: sequences one after another without padding, each distinct prompt once.

Operations on single tokens (embeddings, norms, projections, MLP) run on one long row of real tokens; only attention
needs to know which tokens belong together. transformers has a registry of attention functions, so this works for every
architecture that uses it, with the model's own code.

Axes: ``U`` distinct prompts, ``P`` tokens of the longest, ``B`` completions, ``T`` tokens of the longest,
``N`` tokens in all, ``A`` heads, ``D`` size of a head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding, scaled_dot_product_attention
from transformers import AttentionInterface

from policylab.functional.masks import length_mask
from policylab.functional.products import common_length
from policylab.functional.ragged import Ragged, on_device
from policylab.models.shape import attention_of

#: Name of `_attend` in transformers' registry.
ATTENTION = "policylab_packed"
#: Implementations that `_attend` replaces; its results equal theirs up to rounding.
REPLACED = ("sdpa", "eager")
#: Arguments of attention that `_attend` does not support.
BEYOND = ("sliding_window", "softcap", "s_aux", "position_bias", "cache")


class CannotPackError(Exception):
    """The model's attention does more than `_attend` supports."""


@dataclass(frozen=True)
class Packing:
    """``[prompt 1 | prompt 2 | ... | completion 1 | completion 2 | ... | filler]`` as one row of ``N`` tokens."""

    prompts: Ragged  #: on ``[U, P]``
    completions: Ragged  #: on ``[B, T]``
    prompt_of: Int[Tensor, " B"]  #: the prompt that each completion answers
    bias: Float[Tensor, "B 1 T S"]  #: 0 where a completion's token may attend, -inf elsewhere; ``S = P + T``
    filler: int  #: tokens at the end that no other attends to (`policylab.functional.products.common_length`)

    @classmethod
    def of(
        cls,
        prompt_lengths: Int[Tensor, " U"],
        prompt_of: Int[Tensor, " B"],
        lengths: Int[Tensor, " B"],
        device: torch.device,
    ) -> Self:
        """The packing of prompts and completions with these lengths.

        Args:
            prompt_lengths, prompt_of, lengths: on the CPU, where all but the bias is computed.
            device: device of the packed row.
        """
        prompt_width, width = int(prompt_lengths.max()), int(lengths.max())
        prompts, completions = Ragged.of(prompt_lengths, prompt_width), Ragged.of(lengths, width)
        prompt_lengths, prompt_of, prompt_slots, slots = on_device(
            [prompt_lengths, prompt_of, prompts.slots, completions.slots], device
        )
        sees_prompt = length_mask(prompt_lengths[prompt_of], prompt_width)[:, None].expand(-1, width, -1)
        causal = torch.ones(width, width, dtype=torch.bool, device=device).tril()
        seen = torch.cat([sees_prompt, causal.expand(len(lengths), -1, -1)], dim=-1)[:, None]
        tokens = prompts.count + completions.count
        return cls(
            prompts=replace(prompts, slots=prompt_slots),
            completions=replace(completions, slots=slots),
            prompt_of=prompt_of,
            bias=torch.zeros(seen.shape, device=device).masked_fill(~seen, float("-inf")),
            filler=common_length(tokens, device) - tokens,
        )

    def attend(
        self, query: Float[Tensor, "N A D"], key: Tensor, value: Tensor, scale: float | None
    ) -> Float[Tensor, "N A D"]:
        """Causal attention of each prompt to itself, and of each completion to its prompt and itself."""
        parts = self.prompts.count, self.completions.count, self.filler
        q, k, v = (self.prompts.pad(x.split(parts)[0]) for x in (query, key, value))
        of_prompts = self.prompts.pack(_attention(q, k, v, scale, None))
        zeros = of_prompts.new_zeros(self.filler, *of_prompts.shape[1:])
        if self.completions.count == 0:
            return torch.cat([of_prompts, zeros])
        q, own_k, own_v = (self.completions.pad(x.split(parts)[1]) for x in (query, key, value))
        keys = torch.cat([rows_of(k, self.prompt_of), own_k], dim=1)
        values = torch.cat([rows_of(v, self.prompt_of), own_v], dim=1)
        of_completions = self.completions.pack(_attention(q, keys, values, scale, self.bias))
        return torch.cat([of_prompts, of_completions, zeros])


def rows_of(x: Tensor, index: Int[Tensor, " R"]) -> Tensor:
    """``x[index]``, by the operation with a fast gradient for repeated rows."""
    return embedding(index, x.flatten(1)).unflatten(1, x.shape[1:]) if x.ndim > 1 else x[index]


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, bias: Tensor | None) -> Tensor:
    """Attention from ``[R, W, A, D]`` to the same shape. Without a bias it is causal, so padding at the end of a row is
    never attended to."""
    groups = q.shape[2] // k.shape[2]
    if groups > 1 and bias is not None and q.is_cuda:  # no fused CUDA kernel supports both groups and a mask
        k, v = k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)
    out = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if bias is None else bias.to(q.dtype),
        is_causal=bias is None,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out.transpose(1, 2)


@dataclass(frozen=True)
class _Active:
    """State of `_attend` during a packed forward pass."""

    packing: Packing
    eager: bool  #: whether the model is configured for attention without fused kernels


_active: ContextVar[_Active] = ContextVar("packing")


def _attend(
    module: Any,
    query: Float[Tensor, "1 A N D"],
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Float[Tensor, "1 N A D"], None]:
    """Attention with transformers' signature.

    Raises:
        CannotPackError: for an unsupported argument that would change the result, such as a sliding window.
    """
    asked = [name for name in BEYOND if others.get(name) is not None]
    if asked or dropout or attention_mask is not None:
        raise CannotPackError(", ".join(asked) or "dropout or a mask of its own")
    active = _active.get()
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    with sdpa_kernel(SDPBackend.MATH) if active.eager else nullcontext():
        return active.packing.attend(q, k, v, scaling)[None], None


def replaces_attention(model: Any) -> bool:
    """Whether a model's attention can be replaced in transformers' registry, by `_attend`."""
    return attention_of(model) in REPLACED and bool(model._supports_attention_backend)


AttentionInterface.register(ATTENTION, _attend)


@contextmanager
def packed(config: Any, packing: Packing) -> Iterator[None]:
    """While active, models with this config object use the attention of this packing."""
    own = config._attn_implementation
    eager = own == "eager" or (own == ATTENTION and _active.get().eager)
    token = _active.set(_Active(packing, eager))
    config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        config._attn_implementation = own
        _active.reset(token)
