"""Decoders: sampling many rows at once from causal LMs."""

from __future__ import annotations

import torch
from torch import nn

from policylab.models.decoders.decoder import Decoder
from policylab.models.decoders.general import GeneralDecoder
from policylab.models.decoders.gpt2 import GPT2
from policylab.models.decoders.llama import Llama
from policylab.models.decoders.transformer import Network, TransformerDecoder


def network_for(lm: nn.Module) -> type[Network] | None:
    """The fast implementation that reads this model; None for variants without one."""
    return next((network for network in (GPT2, Llama) if network.reads(lm)), None)


def decoder_for(lm: nn.Module, dtype: torch.dtype) -> Decoder:
    """The fastest decoder for this model; unknown variants use the general one.

    Args:
        dtype: dtype of the products. The decoder casts weights to it once.
    """
    network = network_for(lm)
    return GeneralDecoder(lm) if network is None else TransformerDecoder(network(lm, dtype))
