"""How many tokens and rows fit in memory, from a model's shape. The same for a run and for a plan of it."""

from __future__ import annotations

from policylab.models.shape import Shape

#: Floats that a layer keeps for the backward pass, in hidden sizes a token (GPT-2's, with a fused GELU: 25).
KEPT_PER_LAYER = 30
#: Tables over the vocabulary that are held where whole distributions are compared.
TABLES = 3
#: Memory for these: on a CPU, where larger passes are no faster; on a GPU, this share of all that it has.
CPU_BYTES = 2**30
GPU_SHARE = 0.25
#: Share of a process's memory for what sampling holds beside the weights. There are no activations and gradients then.
ROLLOUT_SHARE = 0.5
#: Attention scores and what is made of them, in numbers a head and token of context.
SCORES = 4
FLOAT = 4  # bytes


def tokens_a_pass(
    shape: Shape, *, whole_distributions: bool, recomputes_layers: bool, gpu_bytes: int | None
) -> int:
    """Tokens of a forward and backward pass whose activations should fit in memory.

    Args:
        whole_distributions: whether the probabilities of all words are held, not a few figures a token.
        recomputes_layers: layers that run again keep only their input, and one of them at a time the rest.
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
        context: tokens of prompt and completion, at most.
        number: bytes of a number of keys and values.
        memory: bytes of the GPU, or of main memory for each process.
    """
    keys = number * 2 * shape.layers * shape.kv_heads * shape.head_dim * context
    a_step = FLOAT * (SCORES * shape.heads * context + TABLES * shape.vocab)
    return max(1, int(ROLLOUT_SHARE * memory / (keys + a_step)))
