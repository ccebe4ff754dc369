"""The sizes of a language model. No other module reads them from a model's config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """The sizes that memory and compute depend on."""

    layers: int
    hidden: int  #: size of the hidden state
    ffn: int  #: width of the MLP inside a layer
    heads: int  #: attention heads; 1 without attention
    kv_heads: int  #: heads of keys and values
    head_dim: int  #: size of a head
    vocab: int  #: size of the LM head's output


def shape_of(lm: Any) -> Shape:
    """The sizes of a Hugging Face causal LM."""
    config = lm.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    return Shape(
        layers=layer_count(lm),
        hidden=config.hidden_size,
        ffn=getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab=lm.get_output_embeddings().weight.shape[0],
    )


def layer_count(model: Any) -> int:
    """Number of layers of a Hugging Face model, by its config."""
    return int(model.config.get_text_config().num_hidden_layers)


def context_of(model: Any) -> int | None:
    """Most positions of a sequence; None without a limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None  # XLNet says -1


def attention_of(model: Any) -> str:
    """transformers' name of the attention implementation."""
    return str(model.config._attn_implementation)
