"""Keys and values of a rollout: those of a prompt are stored once for all rows that continue it.

Axes: ``N`` distinct prompts, ``P`` prompt length, ``B`` rows, ``S`` most rows of any prompt, ``K``
heads of keys and values, ``Q`` queries per such head, ``D`` width of a head.

With one query per row, attention costs as much as reading the keys. All queries of a group read their prompt's keys
in one product, and the softmax is over the tokens of prompt and row together. All rows have the same number of new
tokens, so only prompts of unequal lengths need a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from policylab.functional.masks import length_mask


class SharedPromptCache:
    """A preallocated cache for one rollout.

    Args:
        layers: number of layers.
        heads: number of query heads; a multiple of those of keys and values.
        dtype: dtype of the cache. On a CPU it is always fp32, because attention in bf16 is twice as slow.
    """

    def __init__(self, layers: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.layers, self.scale, self.dtype = layers, head_dim**-0.5, dtype
        self.kv_heads, self.queries, self.head_dim = kv_heads, heads // kv_heads, head_dim
        self.prompts: list[tuple[Tensor, Tensor]] = []  #: keys and values of each layer, [N * K, P, D]
        self.written = 0  #: number of tokens that each row has appended

    def open(self, lengths: Int[Tensor, " N"], prompt_of: Int[Tensor, " B"], room: int) -> None:
        """Allocates room for rows of the prompts that `read_prompt` reads next."""
        if lengths.device.type == "cpu":
            self.dtype = torch.float32
        self.width = int(lengths.max())
        self.mask = length_mask(lengths, self.width)
        #: index of each real token in the right-padded layout
        self.place = self.mask.flatten().nonzero().squeeze(-1)
        self.prompt_of = prompt_of
        shape = (self.layers, 2, len(prompt_of), self.kv_heads, room, self.head_dim)
        self.own = torch.empty(shape, dtype=self.dtype, device=lengths.device)
        self._arrange()

    def read_prompt(
        self, layer: int, q: Float[Tensor, "R KQ D"], kv: Float[Tensor, "R 2 K D"]
    ) -> Float[Tensor, "R H"]:
        """Causal attention over the prompts' tokens, unpadded and in order; stores their keys and values."""
        del layer  # layers are read in order
        n, p = self.mask.shape
        # padding is on the right, where causal attention never reads it
        queries = self._on_grid(q).transpose(1, 2)
        keys, values = (self._on_grid(x).transpose(1, 2) for x in kv.unbind(1))
        out = F.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=self.scale, enable_gqa=self.queries > 1
        )
        self.prompts.append((keys.reshape(-1, p, self.head_dim), values.reshape(-1, p, self.head_dim)))
        return out.transpose(1, 2).reshape(n * p, -1)[self.place]

    def read_token(
        self, layer: int, q: Float[Tensor, "B KQ D"], kv: Float[Tensor, "B 2 K D"]
    ) -> Float[Tensor, "B H"]:
        """Attention of each row's newest token to its prompt and its own tokens, this one included."""
        b, upto = len(q), self.written + 1
        self.own[layer, :, :b, :, self.written] = kv.transpose(0, 1)
        own_keys, own_values = self.own[layer, :, :b].view(2, b * self.kv_heads, -1, self.head_dim)[
            :, :, :upto
        ]
        keys, values = self.prompts[layer]
        q = q.to(self.dtype) * self.scale
        own = torch.bmm(q.reshape(b * self.kv_heads, self.queries, -1), own_keys.transpose(1, 2))
        shared = torch.baddbmm(self.prompt_bias, self._by_prompt(q), keys.transpose(1, 2))
        scores = torch.cat([self._by_row(shared), own], dim=-1)
        weights = scores.float().softmax(-1).to(self.dtype)
        out = self._by_row(torch.bmm(self._by_prompt(weights[..., : self.width]), values))
        return torch.baddbmm(out, weights[..., self.width :], own_values).view(b, -1)

    def keep(self, rows: Int[Tensor, " K"]) -> None:
        """Keeps only these rows, and the prompts that they continue."""
        moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(-1)
        self.own[:, :, moved, :, : self.written] = self.own[:, :, rows[moved], :, : self.written]
        alive, self.prompt_of = self.prompt_of[rows].unique(return_inverse=True)
        if len(alive) < len(self.mask):
            heads = (
                alive[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=alive.device)
            ).flatten()
            self.prompts = [(keys[heads], values[heads]) for keys, values in self.prompts]
            self.mask = self.mask[alive]
        self._arrange()

    def _arrange(self) -> None:
        """Assigns each row its index in the padded table of prompts and their rows."""
        b, n = len(self.prompt_of), len(self.mask)
        order = self.prompt_of.argsort(stable=True)
        counts = self.prompt_of.bincount(minlength=n)
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(b, device=order.device) - first.repeat_interleave(counts)
        self.most = int(counts.max())
        slots = self.prompt_of * self.most + rank
        full = b == n * self.most and bool((slots == torch.arange(b, device=slots.device)).all())
        self.slots = None if full else slots
        padding = torch.zeros_like(self.mask, dtype=self.dtype).masked_fill(~self.mask, float("-inf"))
        self.prompt_bias = padding.repeat_interleave(self.kv_heads, 0)[:, None]

    def _on_grid(self, x: Float[Tensor, "R K D"]) -> Float[Tensor, "N P K D"]:
        """Adds zeros for the padding."""
        n, p = self.mask.shape
        x = x.to(self.dtype)
        if len(x) < n * p:
            x = x.new_zeros(n * p, *x.shape[1:]).index_copy_(0, self.place, x)
        return x.reshape(n, p, *x.shape[1:])

    def _by_prompt(self, x: Float[Tensor, "*BKQ X"]) -> Float[Tensor, "NK SQ X"]:
        """Groups rows, any flattening of ``B K Q X``, by their prompts."""
        n, width = len(self.mask), x.shape[-1]
        x = x.reshape(-1, self.kv_heads, self.queries, width)
        if self.slots is not None:
            x = x.new_zeros(n * self.most, *x.shape[1:]).index_copy_(0, self.slots, x)
        return x.view(n, self.most, *x.shape[1:]).transpose(1, 2).reshape(n * self.kv_heads, -1, width)

    def _by_row(self, x: Float[Tensor, "NK SQ X"]) -> Float[Tensor, "BK Q X"]:
        """The inverse of `_by_prompt`."""
        n, width = len(self.mask), x.shape[-1]
        x = x.view(n, self.kv_heads, self.most, self.queries, width).transpose(1, 2)
        x = x.reshape(n * self.most, self.kv_heads, self.queries, width)
        if self.slots is not None:
            x = x[self.slots]
        return x.reshape(-1, self.queries, width)
