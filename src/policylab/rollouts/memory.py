"""Memory of engines while they sample, in bytes, for plans.

An engine may state its own by two methods: ``memory(size, piece)``, the bytes by purpose that it allocates for a piece
(without it, `sampling_memory`), and ``reserved(size, piece, device_memory)``, those that it holds all the time: its own
copy of the whole model, and what belongs to it.
"""

from __future__ import annotations

from dataclasses import dataclass

from policylab.models.size import FP32, Size


@dataclass(frozen=True)
class Piece:
    """Completions that are sampled at once.

    Args:
        prompts: number of distinct prompts.
        rows: number of completions.
        prompt: mean tokens of a prompt.
        longest: tokens of the longest prompt.
        new: tokens of a completion.
        number: bytes of one number in the products of sampling.
        compute: bytes of one number in the products of training.
        gpu: whether it is sampled on a GPU.
    """

    prompts: int
    rows: int
    prompt: float
    longest: int
    new: int
    number: int
    compute: int
    gpu: bool


def sampling_memory(size: Size, piece: Piece, *, ours: bool = False) -> dict[str, float]:
    """Bytes that sampling a piece allocates, by purpose.

    Args:
        ours: whether one of our decoders samples; otherwise it is transformers, with a copy of a prompt in each row.
    """
    rows, number, context = piece.rows, piece.number, piece.longest + piece.new
    kept = rows * piece.new + piece.prompts * piece.longest if ours else rows * context
    of_cache = FP32 if ours and not piece.gpu else number  # see models/decoders
    # logits of this step, and those of the step before or the weights for drawing a token
    tables = 2 * FP32 + (number if number < FP32 else 0)
    reads = max(piece.prompts * piece.prompt, rows)
    return {
        "weights for sampling": copied_weights(size, piece, ours=ours),
        "KV cache": 2 * size.layers * size.kv_heads * size.head_dim * of_cache * kept,
        "logits": tables * rows * size.vocab,
        "work space": reads * size.transient(max(number, piece.compute))
        + 4 * rows * size.heads * context * FP32,
    }


def copied_weights(size: Size, piece: Piece, *, ours: bool) -> float:
    """Bytes of the weights that a decoder copies for a rollout."""
    casts = piece.number != size.weight_bytes
    if casts or (ours and not piece.gpu):  # the fastest CPU kernel has its own weight layout
        return float((size.linear + size.head) * piece.number)
    if not ours:
        return 0.0
    if size.adapters:  # merged
        return float(size.linear * piece.number)
    return float(size.qkv * piece.number) if size.network and size.network.copies_qkv else 0.0
