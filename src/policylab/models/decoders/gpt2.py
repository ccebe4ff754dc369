"""GPT-2 ("Language models are unsupervised multitask learners", Radford et al., 2019), as transformers builds it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from policylab.models.adapted import whole_weight
from policylab.models.decoders.cache import SharedPromptCache
from policylab.models.decoders.linear import Activation, Linear
from policylab.models.decoders.plain import is_plain
from policylab.models.decoders.transformer import Attend

#: All module classes that this file implements.
KNOWN = {
    *("GPT2LMHeadModel", "GPT2Model", "GPT2Block", "GPT2Attention", "GPT2MLP", "Conv1D"),
    *("LayerNorm", "Embedding", "Linear", "GELU", "GELUTanh", "NewGELUActivation", "Dropout", "ModuleList"),
}


class GPT2:
    """A snapshot of the weights; see `policylab.models.decoders.transformer.Network`."""

    copies_qkv: ClassVar[bool] = False

    def __init__(self, lm: Any, dtype: torch.dtype) -> None:
        body, self.config, self.dtype = lm.transformer, lm.config, dtype
        self.words, self.places = body.wte.weight, body.wpe.weight
        self.blocks = [_Block(block, dtype) for block in body.h]
        self.norm = _Norm(body.ln_f)
        self.head = Linear(lm.lm_head.weight, lm.lm_head.bias, dtype)

    @staticmethod
    def reads(lm: nn.Module) -> bool:
        """Whether a model is an unchanged GPT-2, and not a variant."""
        if not is_plain(lm, KNOWN) or type(lm).__name__ != "GPT2LMHeadModel":
            return False
        config: Any = lm.config
        return config.activation_function in ("gelu_new", "gelu_pytorch_tanh") and not (
            config.add_cross_attention
            or config.scale_attn_by_inverse_layer_idx
            or config.reorder_and_upcast_attn
            or not config.scale_attn_weights
        )

    def cache(self) -> SharedPromptCache:
        heads, width = self.config.n_head, self.config.n_embd // self.config.n_head
        return SharedPromptCache(len(self.blocks), heads, heads, width, self.dtype)

    def hidden(
        self, tokens: Int[Tensor, " R"], positions: Int[Tensor, " R"], attend: Attend
    ) -> Float[Tensor, "R H"]:
        x = (self.words[tokens] + self.places[positions]).float()
        shape = (len(x), 3, self.config.n_head, -1)
        for layer, block in enumerate(self.blocks):
            qkv = block.qkv(block.before(x)).view(shape)
            x = block.out.onto(attend(layer, qkv[:, 0], qkv[:, 1:]), x)
            x = block.down.onto(block.up(block.between(x)), x)
        return self.norm(x)

    def logits(self, hidden: Float[Tensor, "R H"]) -> Float[Tensor, "R V"]:
        return self.head(hidden)


class _Block:
    def __init__(self, block: Any, dtype: torch.dtype) -> None:
        self.before, self.between = _Norm(block.ln_1), _Norm(block.ln_2)
        self.qkv = _linear(block.attn.c_attn, dtype)
        self.out = _linear(block.attn.c_proj, dtype)
        self.up = _linear(block.mlp.c_fc, dtype, "gelu")
        self.down = _linear(block.mlp.c_proj, dtype)


def _linear(conv: Any, dtype: torch.dtype, then: Activation | None = None) -> Linear:
    """GPT-2's layers store weights as ``[in, out]``."""
    return Linear(whole_weight(conv).t(), conv.bias, dtype, then)


class _Norm:
    """LayerNorm in fp32, like the residual stream."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        self.weight, self.bias, self.eps = norm.weight.float(), norm.bias.float(), norm.eps

    def __call__(self, x: Float[Tensor, "R H"]) -> Float[Tensor, "R H"]:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)
