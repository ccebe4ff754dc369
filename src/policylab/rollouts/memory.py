"""Memory of an engine while it samples, in bytes, for plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from policylab.models.size import FP32, Size

Kind = Literal["cached", "generate", "vllm"]


@dataclass(frozen=True)
class Piece:
    """Completions that are sampled at once.

    Args:
        prompts: number of distinct prompts.
        rows: number of completions.
        prompt: mean tokens of a prompt.
        longest: tokens of the longest prompt.
        new: tokens of a completion.
    """

    prompts: int
    rows: int
    prompt: float
    longest: int
    new: int


def sampling_memory(
    kind: Kind, size: Size, piece: Piece, *, number: int, compute: int, gpu: bool
) -> dict[str, float]:
    """Bytes that the engine allocates for a piece, by purpose. Without vLLM, which reserves its memory all the time.

    Args:
        number: bytes of one number in the products of sampling.
        compute: bytes of one number in the products of training.
    """
    if kind == "vllm":
        return {}
    rows, context = piece.rows, piece.longest + piece.new
    per_token = 2 * size.layers * size.kv_heads * size.head_dim
    ours = kind == "cached" and size.decoder != "general"
    if ours:  # on a CPU they are always in fp32 (see models/decoders)
        kept = rows * piece.new + piece.prompts * piece.longest
        cache = per_token * (number if gpu else FP32) * kept
    else:
        cache = per_token * number * rows * context
    # logits of this step, and those of the step before or the weights for drawing a token
    tables = 2 * FP32 + (number if number < FP32 else 0)
    reads = max(piece.prompts * piece.prompt, rows)
    scores = 4 * rows * size.heads * context * FP32
    return {
        "weights for sampling": copied_weights(size, ours=ours, number=number, gpu=gpu),
        "KV cache": cache,
        "logits": tables * rows * size.vocab,
        "work space": reads * size.transient(max(number, compute)) + scores,
    }


def copied_weights(size: Size, *, ours: bool, number: int, gpu: bool) -> float:
    """Bytes of the weights that a decoder copies for a rollout.

    Args:
        ours: whether one of our decoders samples.
    """
    casts = number != size.weight_bytes
    if casts or (ours and not gpu):  # the fastest CPU kernel has its own weight layout
        return float((size.linear + size.head) * number)
    if not ours:
        return 0.0
    if size.adapters:  # merged
        return float(size.linear * number)
    return float(size.qkv * number) if size.decoder == "llama" else 0.0
