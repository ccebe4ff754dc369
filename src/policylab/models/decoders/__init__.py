"""Decoders: how causal LMs write many rows at once."""

from __future__ import annotations

import torch
from torch import nn

from policylab.models.decoders.decoder import Decoder
from policylab.models.decoders.general import GeneralDecoder
from policylab.models.decoders.gpt2 import GPT2
from policylab.models.decoders.llama import Llama
from policylab.models.decoders.transformer import TransformerDecoder


def decoder_for(lm: nn.Module, dtype: torch.dtype) -> Decoder:
    """The fastest decoder for this model. Variants that are not known take the general one.

    Args:
        dtype: of the products. Other weights are cast to it once, in the decoder.
    """
    for network in (GPT2, Llama):
        if network.reads(lm):
            return TransformerDecoder(network(lm, dtype))
    return GeneralDecoder(lm)
