"""How many tokens and rows fit in memory, from a model's shape. Runs and plans share these numbers."""

from __future__ import annotations

from policylab.models.shape import Shape

#: Floats per token that a layer keeps for the backward pass, in hidden sizes (GPT-2 with a fused GELU: 25).
KEPT_PER_LAYER = 30
#: ``[N, V]`` tables that are held when whole distributions are compared.
TABLES = 3
#: Memory budget for activations and tables: a fixed size on a CPU, where larger passes are no faster; on a GPU, this
#: fraction of its memory.
CPU_BYTES = 2**30
GPU_SHARE = 0.25
#: Fraction of a process's memory for sampling, beside the weights; sampling holds no activations and gradients.
ROLLOUT_SHARE = 0.5
#: Attention scores and their temporary copies, in numbers per head and token of context.
SCORES = 4
FLOAT = 4  # bytes


def tokens_a_pass(
    shape: Shape, *, whole_distributions: bool, recomputes_layers: bool, gpu_bytes: int | None
) -> int:
    """Tokens of a forward and backward pass whose activations should fit in memory.

    Args:
        whole_distributions: whether a pass holds the probabilities of the whole vocabulary, not only a few numbers per
            token.
        recomputes_layers: whether layers keep only their input, and one layer at a time is recomputed.
        gpu_bytes: memory of the GPU; None on a CPU.
    """
    layers = shape.layers
    floats = layers + KEPT_PER_LAYER if recomputes_layers else layers * KEPT_PER_LAYER
    vocab = shape.vocab if whole_distributions else 0
    kept = FLOAT * (floats * shape.hidden + TABLES * vocab)
    return max(1, int((CPU_BYTES if gpu_bytes is None else GPU_SHARE * gpu_bytes) / kept))


def rows_at_once(shape: Shape, *, context: int, number: int, memory: float) -> int:
    """Completions whose keys, values, attention scores and logits should fit in memory while they are sampled.

    Args:
        context: most tokens of prompt and completion.
        number: bytes of one number of keys and values.
        memory: bytes of the GPU, or of main memory for each process.
    """
    keys = number * 2 * shape.layers * shape.kv_heads * shape.head_dim * context
    a_step = FLOAT * (SCORES * shape.heads * context + TABLES * shape.vocab)
    return max(1, int(ROLLOUT_SHARE * memory / (keys + a_step)))
