"""Llama and similar models: Qwen2, with biases of queries, keys and values, and Qwen3, with norms of queries and keys.

"LLaMA: open and efficient foundation language models", arXiv:2302.13971; "Qwen2 technical report",
arXiv:2407.10671; "Qwen3 technical report", arXiv:2505.09388. SmolLM2 is a Llama.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from policylab.models.adapted import whole_weight
from policylab.models.decoders.cache import SharedPromptCache
from policylab.models.decoders.linear import Activation, Linear
from policylab.models.decoders.plain import is_plain
from policylab.models.decoders.transformer import Attend

FAMILIES = ("Llama", "Qwen2", "Qwen3")
#: All module classes that this file implements.
PARTS = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm", "RotaryEmbedding")
KNOWN = {
    *(family + part for family in FAMILIES for part in PARTS),
    *("Embedding", "Linear", "SiLU", "SiLUActivation", "ModuleList"),
}
#: Kinds of rotary embeddings whose angles depend only on the position.
ROTARY = ("default", "linear", "llama3", "yarn")


class Llama:
    """A snapshot of the weights; see `policylab.models.decoders.transformer.Network`.

    Queries, keys and values are computed by one product with concatenated weights.
    """

    copies_qkv: ClassVar[bool] = True

    def __init__(self, lm: Any, dtype: torch.dtype) -> None:
        body, config = lm.model, lm.config
        self.dtype, self.words, self.rotary = dtype, body.embed_tokens.weight, body.rotary_emb
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = body.layers[0].self_attn.head_dim
        self.blocks = [_Block(layer, self.heads, self.kv_heads, dtype) for layer in body.layers]
        self.norm = body.norm
        self.head = Linear(lm.lm_head.weight, lm.lm_head.bias, dtype)

    @staticmethod
    def reads(lm: nn.Module) -> bool:
        """Whether a model is an unchanged one of these, and not a variant."""
        if not is_plain(lm, KNOWN) or type(lm).__name__.removesuffix("ForCausalLM") not in FAMILIES:
            return False
        config: Any = lm.config
        return (
            config.hidden_act == "silu"
            and config.rope_parameters["rope_type"] in ROTARY
            and set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
            and not (lm.training and config.attention_dropout > 0)
        )

    def cache(self) -> SharedPromptCache:
        return SharedPromptCache(len(self.blocks), self.heads, self.kv_heads, self.head_dim, self.dtype)

    def hidden(
        self, tokens: Int[Tensor, " R"], positions: Int[Tensor, " R"], attend: Attend
    ) -> Float[Tensor, "R H"]:
        x = self.words[tokens].float()
        cos, sin = self.rotary(x, positions[None])
        half = self.head_dim // 2
        # rotation of halves: (a, b) -> (a cos - b sin, b cos + a sin)
        cos, sin = cos[0, :, None], torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], dim=-1)
        turned = self.heads + self.kv_heads
        for layer, block in enumerate(self.blocks):
            heads = block.qkv(_norm(x, block.before)).view(len(x), turned + self.kv_heads, -1)
            qk = block.normalized(heads[:, :turned])
            qk = torch.addcmul(qk * cos, qk.roll(half, -1), sin)
            kv = torch.stack([qk[:, self.heads :], heads[:, turned:].to(qk.dtype)], dim=1)
            x = block.out.onto(attend(layer, qk[:, : self.heads], kv), x)
            normed = _norm(x, block.between)
            x = block.down.onto(block.up(normed).mul_(block.gate(normed)), x)
        return _norm(x, self.norm)

    def logits(self, hidden: Float[Tensor, "R H"]) -> Float[Tensor, "R V"]:
        return self.head(hidden)


class _Block:
    def __init__(self, layer: Any, heads: int, kv_heads: int, dtype: torch.dtype) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm
        parts = attention.q_proj, attention.k_proj, attention.v_proj
        biases = [part.bias for part in parts if part.bias is not None]
        self.qkv = Linear(
            torch.cat([whole_weight(part).to(dtype) for part in parts]),
            torch.cat(biases) if biases else None,
            dtype,
        )
        self.out = _linear(attention.o_proj, dtype)
        self.up = _linear(mlp.up_proj, dtype)
        self.gate = _linear(mlp.gate_proj, dtype, "swish")
        self.down = _linear(mlp.down_proj, dtype)
        self.head_norm: Tensor | None = None
        if hasattr(attention, "q_norm"):
            each = (attention.q_norm, heads), (attention.k_norm, kv_heads)
            self.head_norm = torch.cat([norm.weight.detach().float().expand(n, -1) for norm, n in each])
            self.head_eps = attention.q_norm.variance_epsilon

    def normalized(self, qk: Float[Tensor, "R K D"]) -> Float[Tensor, "R K D"]:
        """Queries and keys with each head's norm, if the model has one."""
        return qk if self.head_norm is None else _rms(qk, self.head_eps) * self.head_norm


def _linear(layer: Any, dtype: torch.dtype, then: Activation | None = None) -> Linear:
    return Linear(whole_weight(layer), layer.bias, dtype, then)


def _norm(x: Float[Tensor, "R H"], norm: Any) -> Float[Tensor, "R H"]:
    return _rms(x, norm.variance_epsilon) * norm.weight


def _rms(x: Float[Tensor, "*B H"], eps: float) -> Float[Tensor, "*B H"]:
    return x * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
