"""A language model in numbers. Nothing else reads its size from a config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """What memory and work depend on."""

    layers: int
    hidden: int  #: size of the hidden state
    ffn: int  #: width of the MLP inside a layer
    heads: int  #: of attention; 1 where there is none
    kv_heads: int  #: heads of keys and values
    head_dim: int  #: size of a head
    vocab: int  #: tokens that the LM head scores


def shape_of(lm: Any) -> Shape:
    """The numbers of a Hugging Face causal LM."""
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
    """Layers of a Hugging Face model, as its config says."""
    return int(model.config.get_text_config().num_hidden_layers)


def context_of(model: Any) -> int | None:
    """Positions that a sequence may have; None without a limit."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if limit and limit > 0 else None  # XLNet says -1


def attention_of(model: Any) -> str:
    """The attention implementation, as transformers calls it."""
    return str(model.config._attn_implementation)
