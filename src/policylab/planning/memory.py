"""What a process holds at the four moments of an iteration that take most, in bytes: what its parts say, summed up.

docs/plan.md holds the sums against measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from policylab.distributed.allocator import KEPT
from policylab.functional.linear_head import tables_at_once
from policylab.models.size import FP32
from policylab.planning.job import Job
from policylab.rollouts.memory import sampling_memory

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
    found = {"rollout": rollout(job)}
    if job.cost.forwards or job.critic_layers:
        found["evaluation"] = evaluation(job)
    found |= {"backward": backward(job), "step": step(job)}
    result = []
    for name, parts in found.items():
        parts = held_throughout(job) | parts
        if not job.hardware.gpu:
            parts["checkpoint copy"] = checkpoint_copy(job) if job.checkpoints else 0.0
            parts["freed and kept"] = FREED + HOLES * (sum(parts.values()) - LIBRARIES)
        result.append(Moment(name, {part: size for part, size in parts.items() if size}))
    return result


def peak(job: Job) -> Moment:
    """The moment that takes most."""
    return max(moments(job), key=lambda moment: moment.total)


def held_throughout(job: Job) -> dict[str, float]:
    """What stays in memory from one iteration to the next."""
    size, hardware, policy, critic = job.size, job.hardware, job.policy, job.critic
    on_device = 0.0 if hardware.offload else 1.0 / job.spread
    networks = {"weights": size.weights, "reference": 0.0, "critic": critic.weights, "target network": 0.0}
    if job.needs.reference != "none" and not size.adapters:
        networks["reference"] = policy.weights + policy.average * (job.needs.reference == "moving")
    if job.needs.target:
        networks["target network"] = policy.weights + critic.weights + policy.average + critic.average
    parts = {name: weights * on_device for name, weights in (networks | {"optimizer": job.state}).items()}
    if buckets(job):
        parts["gradients"] = job.gradients
    if job.engine == "vllm":
        # Its own copy of the weights, whole, and its cache in what is left of its share.
        own = size.parameters * job.sampling_bytes
        parts["vLLM"] = max(job.engine_share * hardware.memory, own)
    return parts | {"libraries": CONTEXT if hardware.gpu else LIBRARIES}


def buckets(job: Job) -> bool:
    """Whether gradients lie in the buckets that are sent, which stay."""
    return job.plan.processes > 1 and not job.hardware.sharded


def rollout(job: Job) -> dict[str, float]:
    """The largest piece of a rollout: of training, or of a validation batch."""
    found = [
        sampling_memory(
            job.engine,
            job.size,
            piece,
            number=job.sampling_bytes,
            compute=job.compute_bytes,
            gpu=job.hardware.gpu,
        )
        for piece in job.largest_pieces()
    ]
    return gathered(job, whole=True) | max(found, key=lambda parts: sum(parts.values()))


def evaluation(job: Job) -> dict[str, float]:
    """A forward pass without gradient: the reference's, or the policy's log-probs once more."""
    whole = job.tokens(job.sequences)
    tokens = min(whole, max(job.limit, job.context))
    return a_pass(job, tokens, job.sequences * tokens / whole)


def backward(job: Job) -> dict[str, float]:
    """The end of a forward pass, when its activations are all there and the head's gradient is made."""
    several, head = job.micro_batches > 1, head_gradient(job)
    parts = a_pass(job, job.pass_tokens, job.pass_sequences, gradients=True)
    parts["activations"] = job.pass_tokens * job.size.keeps(
        job.compute_bytes,
        job.prompt_tokens,
        job.new_tokens,
        job.longest_prompt,
        recomputes_layers=job.hardware.gradient_checkpointing,
        critic_layers=job.critic_layers,
    )
    parts["work space"] += (head if several else 0) + vectors(job)
    return gradients(job, job.gradients / job.spread if several else head) | parts


def step(job: Job) -> dict[str, float]:
    """The end of a backward pass and the optimizer's step: gradients whole, activations gone."""
    embeddings = head_gradient(job)
    waiting = embeddings * (2 if job.micro_batches > 1 and job.size.tied else 1)
    space = {"weights for products": cast_weights(job), "work space": waiting + vectors(job)}
    return gradients(job, job.gradients / job.spread) | gathered(job, gradients=True) | space


# -- what they are made of -----------------------------------------------------------------------------------


def a_pass(job: Job, tokens: float, rows: float, *, gradients: bool = False) -> dict[str, float]:
    """A forward pass but for its activations."""
    size, actions = job.size, rows * job.new_tokens
    if job.needs.whole_distributions:
        logits = WHOLE_TABLES * actions * size.vocab * FP32
    else:
        logits = tables_at_once(actions * size.vocab, compares=job.cost.compares)
    # Who may look at whom: a number and two bits of truth a pair.
    mask = actions * job.context * (FP32 + 2)
    # A CPU's kernel copies the weight that it multiplies by; the head's is the largest.
    plain = not (job.hardware.gpu or cast_weights(job))
    reordered = size.head * size.weight_bytes if plain else 0
    transient = size.transient(max(job.compute_bytes, job.sampling_bytes))
    return gathered(job, gradients=gradients) | {
        "weights for products": cast_weights(job),
        "logits": logits,
        "work space": tokens * transient + mask + reordered,
    }


def gradients(job: Job, size: float) -> dict[str, float]:
    """Gradients that do not lie in buckets."""
    return {} if buckets(job) else {"gradients": 0.0 if job.hardware.offload else size}


def gathered(job: Job, *, whole: bool = False, gradients: bool = False) -> dict[str, float]:
    """Sharded weights, while they are whole."""
    used = job.size.gathered(whole=whole, gradients=gradients) if job.hardware.sharded else 0.0
    return {"gathered weights": used}


def head_gradient(job: Job) -> float:
    """The gradient of the head's weights, where they train."""
    return job.size.head * job.size.weight_bytes if job.size.trained > job.size.linear else 0


def vectors(job: Job) -> float:
    """A trust region's."""
    return job.cost.vectors * job.size.trained * FP32


def cast_weights(job: Job) -> float:
    """Weights in the precision of the products, which autocast makes once an iteration."""
    casts = job.compute_bytes < job.size.weight_bytes
    return (job.size.linear + job.size.head) * job.compute_bytes if casts else 0.0


# -- main memory -----------------------------------------------------------------------------------------------


def checkpoint_copy(job: Job) -> float:
    """The state in main memory while it is written beside the training (see runs/writing.py)."""
    size, policy, critic = job.size, job.policy, job.critic
    state = job.state + critic.weights + (policy.weights if size.adapters else size.weights)
    if job.needs.reference == "moving":
        state += policy.weights + policy.average
    if job.needs.target:
        state += policy.weights + policy.average + critic.weights + critic.average
    return state


def main_memory(job: Job) -> float:
    """Of a machine with GPUs: the libraries of its processes, a checkpoint's copy, and shards that were put there."""
    hardware, size = job.hardware, job.size
    total = hardware.local * 4 * LIBRARIES + (checkpoint_copy(job) if job.checkpoints else 0.0)
    if hardware.offload:
        state = size.parameters * size.weight_bytes + job.critic.weights + job.gradients + job.state
        state += job.policy.weights * (job.needs.reference != "none")
        total += state * hardware.local / job.plan.processes
    return total
