"""What a process holds at the four moments of an iteration that take most: arithmetic over a `Job`, in bytes.

Each function says what the code that it speaks of allocates; docs/plan.md holds the sums against measured peaks.

Axes: ``B`` sequences, ``T`` sampled positions, ``P`` prompt length, ``V`` vocabulary, ``H`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from policylab.distributed.allocator import KEPT
from policylab.functional.linear_head import CHUNK
from policylab.planning.job import FP32, Job

GIB = 2**30
#: What Python, torch, Lightning and transformers take before there is a model, measured: resident memory on a CPU; the
#: driver's context and the libraries' handles on a GPU, which is an assumption.
LIBRARIES = 0.42 * GIB
CONTEXT = 0.75 * GIB
#: Freed memory that the C library keeps for the next tensors, measured after some tens of iterations: most of what
#: distributed/allocator.py allows, and holes between what is in use, as a share of that.
FREED = 0.7 * KEPT
HOLES = 0.1
#: Tables over tokens and vocabulary that are held at once where whole distributions are compared.
WHOLE_TABLES = 6


@dataclass(frozen=True)
class Moment:
    """What is held at once."""

    name: str
    parts: dict[str, float]  #: bytes, by what they are for

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def moments(job: Job) -> list[Moment]:
    """The moments of an iteration, in its order; those without work are left out."""
    held = {name: size for name, size in held_throughout(job).items() if size}
    found = [Moment("rollout", held | rollout(job))]
    if job.method.forwards or (job.critic is not None and job.critic.layers):
        found.append(Moment("evaluation", held | evaluation(job)))
    found += [Moment("backward", held | backward(job)), Moment("step", held | step(job))]
    if not job.hardware.gpu:
        copy = checkpoint_copy(job) if job.checkpoints else 0.0
        found = [Moment(m.name, m.parts | {"checkpoint copy": copy}) for m in found]
        found = [Moment(m.name, m.parts | {"freed and kept": kept_free(m)}) for m in found]
    return [Moment(m.name, {name: size for name, size in m.parts.items() if size}) for m in found]


def kept_free(moment: Moment) -> float:
    """Memory that is in no use and yet not given back."""
    return FREED + HOLES * (moment.total - moment.parts["libraries"])


def peak(job: Job) -> Moment:
    """The moment that takes most."""
    return max(moments(job), key=lambda moment: moment.total)


def held_throughout(job: Job) -> dict[str, float]:
    """What stays in memory from one iteration to the next."""
    shape, method, hardware = job.shape, job.method, job.hardware
    on_device = 0.0 if hardware.offload else 1.0 / (hardware.processes if hardware.sharded else 1)
    own = shape.parameters * shape.weight_bytes + shape.adapters * FP32
    reference = 0.0 if shape.adapters else trained_bytes(job)
    parts = {
        "weights": own * on_device,
        "reference": (reference + averages_bytes(job) * method.moving) * on_device * method.reference,
        "critic": critic_bytes(job) * on_device,
        "target network": (trained_bytes(job) + critic_bytes(job) + averages_bytes(job))
        * on_device
        * method.target,
        "optimizer": state_bytes(job) * on_device,
    }
    if hardware.processes > 1 and not hardware.sharded:
        parts["gradients"] = optimized_bytes(job)  # they lie in the buckets that are sent, which stay
    if job.engine == "vllm":
        # Its own copy of the weights, whole, and its cache in what is left of its share.
        parts["vLLM"] = max(job.engine_share * hardware.memory, shape.parameters * job.sampling_bytes)
    return parts | {"libraries": CONTEXT if hardware.gpu else LIBRARIES}


def trained_bytes(job: Job) -> float:
    """Of the policy's weights that have a gradient."""
    return job.shape.trained * (FP32 if job.shape.adapters else job.shape.weight_bytes)


def critic_bytes(job: Job) -> float:
    return 0.0 if job.critic is None else job.critic.parameters * job.shape.weight_bytes


def optimized_bytes(job: Job) -> float:
    """Of the weights that the optimizer moves; their gradients are as large."""
    return critic_bytes(job) + (trained_bytes(job) if job.method.optimizes_policy else 0.0)


def state_bytes(job: Job) -> float:
    """Of the optimizer's state: two moments and, of weights below fp32, a copy, all in fp32 (training/optimizer.py)."""
    shape, low = job.shape, job.shape.weight_bytes < FP32
    policy = shape.trained * job.method.optimizes_policy * (3 if low and not shape.adapters else 2)
    critic = 0 if job.critic is None else job.critic.parameters * (3 if low else 2)
    return FP32 * float(policy + critic)


def averages_bytes(job: Job) -> float:
    """Of the fp32 average that a network below fp32 follows another by (training/average.py)."""
    shape = job.shape
    if shape.weight_bytes >= FP32 or shape.adapters:
        return 0.0
    critic = 0 if job.critic is None or not job.method.target else job.critic.parameters
    return FP32 * float(shape.trained + critic)


# -- sampling ----------------------------------------------------------------------------------------------


def rollout(job: Job) -> dict[str, float]:
    """The largest piece of a rollout: of training, or of a validation batch."""
    batch, processes = job.batch, job.hardware.processes
    rows = min(job.rows, max(1, batch.validation // processes))
    sizes = [(rows, rows)]
    if batch.samples:
        rows = min(job.rows, job.sequences)
        sizes.append((min(job.prompts, -(-rows // batch.group)), rows))
    return max((sampling(job, *size) for size in sizes), key=lambda parts: sum(parts.values()))


def sampling(job: Job, prompts: int, rows: int) -> dict[str, float]:
    """What an engine holds that writes ``rows`` completions of so many distinct prompts."""
    if job.engine == "vllm":
        return {"gathered weights": gathered(job, whole=True)}
    shape, batch = job.shape, job.batch
    context = batch.longest_prompt + batch.new_tokens
    per_token = 2 * shape.layers * shape.kv_heads * shape.head_dim
    if job.engine == "cached" and shape.decoder != "general":
        # A CPU keeps them in fp32 whatever the products are in (see models/decoders).
        number = job.sampling_bytes if job.hardware.gpu else FP32
        cache = per_token * number * (rows * batch.new_tokens + prompts * batch.longest_prompt)
    else:
        cache = per_token * job.sampling_bytes * rows * context
    # The logits of this step and of the one before, or beside them the weights that a token is drawn by.
    tables = 2 * FP32 + (job.sampling_bytes if job.sampling_bytes < FP32 else 0)
    reads = max(prompts * batch.prompt_tokens, rows)
    scores = 4 * rows * shape.heads * context * FP32
    return {
        "gathered weights": gathered(job, whole=True),
        "weights for sampling": packed_weights(job),
        "KV cache": cache,
        "logits": tables * rows * shape.vocab,
        "work space": reads * transient(job) + scores,
    }


def packed_weights(job: Job) -> float:
    """The copy of the weights that a decoder makes for a rollout."""
    shape, number = job.shape, job.sampling_bytes
    casts = number != shape.weight_bytes
    if job.engine != "cached" or shape.decoder == "general":
        return (shape.linear + shape.head) * number if casts else 0.0
    if not job.hardware.gpu or casts:  # a CPU's fastest kernel wants a layout of its own
        return (shape.linear + shape.head) * number
    if shape.adapters:  # merged
        return shape.linear * number
    return shape.qkv * number if shape.decoder == "llama" else 0.0


def gathered(job: Job, *, whole: bool = False, gradients: bool = False) -> float:
    """Weights that are sharded, gathered for use: all of them, or what is in no layer and two layers, of which one is
    on its way; with ``gradients``, those of one and of what is in no layer, before they are shared out."""
    shape = job.shape
    if not job.hardware.sharded:
        return 0.0
    outside = shape.parameters - shape.layers * shape.layer_parameters
    weights = shape.parameters if whole else outside + 2 * shape.layer_parameters
    weights += outside + shape.layer_parameters if gradients and not shape.adapters else 0
    return weights * shape.weight_bytes


# -- forward and backward passes -----------------------------------------------------------------------------


def evaluation(job: Job) -> dict[str, float]:
    """A forward pass without gradient: the reference's, or the policy's log-probs once more."""
    whole = job.tokens(job.sequences)
    tokens = min(whole, max(job.limit, job.batch.longest_prompt + job.batch.new_tokens))
    rows = job.sequences * tokens / whole
    return {
        "gathered weights": gathered(job),
        "weights for products": cast_weights(job),
        "logits": tables(job, rows * job.batch.new_tokens),
        "work space": tokens * transient(job) + mask(job, rows) + reordered(job),
    }


def backward(job: Job) -> dict[str, float]:
    """The end of a forward pass, when its activations are all there and the head's gradient is made."""
    held_already = job.hardware.processes > 1 and not job.hardware.sharded
    spread = job.hardware.processes if job.hardware.sharded else 1
    head = job.shape.head * job.shape.weight_bytes if job.shape.trained > job.shape.linear else 0
    gradients = optimized_bytes(job) / spread if job.micro_batches > 1 else head
    parts = {
        "gathered weights": gathered(job, gradients=True),
        "weights for products": cast_weights(job),
        "activations": job.pass_tokens * activations(job),
        "logits": tables(job, job.pass_sequences * job.batch.new_tokens),
        "work space": job.pass_tokens * transient(job)
        + mask(job, job.pass_sequences)
        + reordered(job)
        + (head if job.micro_batches > 1 else 0)
        + job.method.vectors * job.shape.trained * FP32,
    }
    return parts if held_already else {"gradients": 0.0 if job.hardware.offload else gradients} | parts


def step(job: Job) -> dict[str, float]:
    """The end of a backward pass and the optimizer's step: gradients whole, activations gone."""
    shape = job.shape
    spread = job.hardware.processes if job.hardware.sharded else 1
    embeddings = shape.head * shape.weight_bytes if shape.trained > shape.linear else 0
    waiting = embeddings * (1 if job.micro_batches == 1 else 2) if shape.tied else embeddings
    parts = {
        "gathered weights": gathered(job, gradients=True),
        "weights for products": cast_weights(job),
        "work space": waiting + job.method.vectors * shape.trained * FP32,
    }
    if job.hardware.processes > 1 and not job.hardware.sharded:
        return parts
    return {"gradients": 0.0 if job.hardware.offload else optimized_bytes(job) / spread} | parts


def activations(job: Job) -> float:
    """Bytes a token that a forward pass keeps."""
    shape = job.shape
    kept = shape.kept(job.compute_bytes, 1 + job.batch.prompt_tokens / job.batch.new_tokens)
    if shape.eager:
        context = job.batch.longest_prompt + job.batch.new_tokens
        kept += 2 * shape.heads * context * job.compute_bytes
    residual = max(job.compute_bytes, shape.weight_bytes)
    ends = 4 * shape.hidden * residual  # embeddings, the final norm, and the states that chose the actions
    again = job.hardware.gradient_checkpointing  # all inputs, and one layer at a time
    own = shape.layers * shape.hidden * residual + kept if again else shape.layers * kept
    return ends + own + (job.critic.layers * kept if job.critic else 0.0)


def transient(job: Job) -> float:
    """Bytes a token of what a layer makes on the way."""
    shape = job.shape
    return ((3 if shape.gated else 2) * shape.ffn + 4 * shape.hidden) * max(
        job.compute_bytes, job.sampling_bytes
    )


def tables(job: Job, actions: float) -> float:
    """Logits of a pass, and what is made of them (see functional/linear_head.py)."""
    size = actions * job.shape.vocab * FP32
    if job.method.whole:
        return WHOLE_TABLES * size
    chunk = CHUNK * FP32
    alike = 1 if job.method.compares else 0
    return (2 + alike) * size if size <= chunk else (3 + alike) * chunk


def mask(job: Job, rows: float) -> float:
    """Who may look at whom: a number and two bits of truth a pair."""
    batch = job.batch
    return rows * batch.new_tokens * (batch.longest_prompt + batch.new_tokens) * (FP32 + 2)


def cast_weights(job: Job) -> float:
    """Weights in the precision of the products, which autocast makes once an iteration."""
    return (job.shape.linear + job.shape.head) * job.compute_bytes if job.casts else 0.0


def reordered(job: Job) -> float:
    """A CPU's kernel copies the weight that it multiplies by; the head's is the largest."""
    return 0.0 if job.hardware.gpu or job.casts else job.shape.head * job.shape.weight_bytes


# -- main memory -----------------------------------------------------------------------------------------------


def checkpoint_copy(job: Job) -> float:
    """The state in main memory while it is written beside the training (see runs/writing.py)."""
    shape = job.shape
    weights = 0.0 if shape.adapters else shape.parameters * shape.weight_bytes
    slow = trained_bytes(job) + averages_bytes(job)
    moving = slow * job.method.moving + (slow + critic_bytes(job)) * job.method.target
    adapters = shape.adapters * FP32
    return weights + adapters + critic_bytes(job) + moving + state_bytes(job)


def main_memory(job: Job) -> float:
    """Of a machine with GPUs: the libraries of its processes, a checkpoint's copy, and shards that were put there."""
    hardware = job.hardware
    total = hardware.local * 4 * LIBRARIES + (checkpoint_copy(job) if job.checkpoints else 0.0)
    if hardware.offload:
        shape = job.shape
        state = (
            shape.parameters * shape.weight_bytes
            + critic_bytes(job)
            + optimized_bytes(job)
            + state_bytes(job)
        )
        state += trained_bytes(job) * job.method.reference
        total += state * hardware.local / hardware.processes
    return total


def parts_in_order(found: list[Moment]) -> Iterator[str]:
    """Names of all parts, those that stay first."""
    yield from dict.fromkeys(name for moment in found for name in moment.parts)
