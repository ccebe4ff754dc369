"""Memory of a process, in bytes, at the four moments of an iteration that need most. Adds up the memory of its parts.

docs/plan.md compares the sums with measured peaks.
"""

from __future__ import annotations

from dataclasses import dataclass

from policylab.distributed.allocator import KEPT
from policylab.functional.linear_head import tables_at_once
from policylab.models.size import FP32
from policylab.planning.job import Job
from policylab.rollouts.memory import sampling_memory
from policylab.training.average import average_bytes

GIB = 2**30
#: Memory of Python, torch, Lightning and transformers before a model is loaded: measured resident memory on a CPU; on a
#: GPU, an assumed size of the driver's context and the libraries' handles.
LIBRARIES = 0.42 * GIB
CONTEXT = 0.75 * GIB
#: Freed memory that the C library keeps for later tensors, measured after some tens of iterations: most of what
#: distributed/allocator.py allows, and fragmentation, as a fraction of the memory in use.
FREED = 0.7 * KEPT
HOLES = 0.1
#: ``[N, V]`` tables that are held at once when whole distributions are compared.
WHOLE_TABLES = 6


@dataclass(frozen=True)
class Moment:
    """The memory held at one moment of an iteration."""

    name: str
    parts: dict[str, float]  #: bytes by purpose

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def moments(job: Job) -> list[Moment]:
    """The moments of an iteration, in order, without those that do nothing."""
    found = {"rollout": rollout(job)}
    if job.cost.forwards or job.critic_size.layers:
        found["evaluation"] = evaluation(job)
    found |= {"backward": backward(job), "step": step(job)}
    result = []
    for name, parts in found.items():
        parts = held_throughout(job) | parts
        if not job.hardware.gpu:
            parts["checkpoint copy"] = checkpoint_copy(job)
            parts["freed and kept"] = FREED + HOLES * (sum(parts.values()) - LIBRARIES)
        result.append(Moment(name, {part: size for part, size in parts.items() if size}))
    return result


def peak(job: Job) -> Moment:
    """The moment that needs most memory."""
    return max(moments(job), key=lambda moment: moment.total)


# -- what is held, whole -----------------------------------------------------------------------------------------


def networks(job: Job) -> dict[str, float]:
    """All weights, and the optimizer's state."""
    policy, critic, number = job.size.trained, job.critic_size.parameters, job.size.trained_bytes
    both, moving = policy + critic, job.needs.reference == "moving"
    copied = job.needs.reference != "none" and not job.size.adapters  # they are turned off for the reference
    return {
        "weights": job.size.weights,
        "reference": copied * (policy * number + moving * average_bytes(policy, number)),
        "critic": float(critic * number),
        "target network": job.needs.target * (both * number + average_bytes(both, number)),
        "optimizer": job.state,
    }


def checkpoint_copy(job: Job) -> float:
    """The copy of the state in main memory while it is written in the background (see runs/writing.py)."""
    saved = networks(job)
    if job.size.adapters:
        saved["weights"] = float(job.size.trained * job.size.trained_bytes)
    if job.needs.reference != "moving":
        del saved["reference"]
    return sum(saved.values()) * job.checkpoints


def main_memory(job: Job) -> float:
    """Main memory of a machine with GPUs: its processes' libraries, a checkpoint's copy, and offloaded shards."""
    hardware = job.hardware
    offloaded = (sum(networks(job).values()) + job.gradients) * hardware.offload / job.plan.processes
    return hardware.local * (4 * LIBRARIES + offloaded) + checkpoint_copy(job)


# -- the moments -------------------------------------------------------------------------------------------------


def held_throughout(job: Job) -> dict[str, float]:
    """Memory that is held during the whole iteration."""
    hardware = job.hardware
    on_device = 0.0 if hardware.offload else 1.0 / job.spread
    parts = {name: size * on_device for name, size in networks(job).items()}
    if buckets(job):
        parts["gradients"] = job.gradients
    return parts | reserved(job) | {"libraries": CONTEXT if hardware.gpu else LIBRARIES}


def reserved(job: Job) -> dict[str, float]:
    """What the engine holds all the time: its own copy of the whole model, and what belongs to it."""
    state = getattr(job.engine, "reserved", None)
    return {} if state is None else state(job.size, job.largest_pieces()[0], job.hardware.memory)


def buckets(job: Job) -> bool:
    """Whether gradients are views of DDP's buckets, which are never freed."""
    return job.plan.processes > 1 and not job.hardware.sharded


def rollout(job: Job) -> dict[str, float]:
    """The largest piece of a rollout, in training or in a validation batch."""
    memory = getattr(job.engine, "memory", sampling_memory)
    found = [memory(job.size, piece) for piece in job.largest_pieces()]
    return gathered(job, whole=True) | max(found, key=lambda parts: sum(parts.values()))


def evaluation(job: Job) -> dict[str, float]:
    """A forward pass without gradient: the reference's, or the policy's, for recomputed log-probs."""
    whole = job.tokens(job.sequences)
    tokens = min(whole, max(job.limit, job.context))
    return a_pass(job, tokens, job.sequences * tokens / whole)


def backward(job: Job) -> dict[str, float]:
    """The end of a forward pass, when it holds all activations and computes the head's gradient."""
    several, head = job.micro_batches > 1, head_gradient(job)
    rows = job.minibatch * min(1.0, job.pass_tokens / job.tokens(job.minibatch))
    parts = a_pass(job, job.pass_tokens, rows, gradients=True)
    parts["activations"] = job.pass_tokens * job.size.keeps(
        job.compute_bytes,
        job.prompt_tokens,
        job.new_tokens,
        job.longest_prompt,
        recomputes_layers=job.hardware.gradient_checkpointing,
        critic_layers=job.critic_size.layers,
    )
    parts["work space"] += (head if several else 0) + vectors(job)
    return gradients(job, job.gradients / job.spread if several else head) | parts


def step(job: Job) -> dict[str, float]:
    """The end of a backward pass and the optimizer's step: all gradients, no activations."""
    waiting = head_gradient(job) * (2 if job.micro_batches > 1 and job.size.tied else 1)
    space = {"weights for products": cast_weights(job), "work space": waiting + vectors(job)}
    return gradients(job, job.gradients / job.spread) | gathered(job, gradients=True) | space


# -- parts of the moments ------------------------------------------------------------------------------------


def a_pass(job: Job, tokens: float, rows: float, *, gradients: bool = False) -> dict[str, float]:
    """A forward pass without its activations."""
    size, actions = job.size, rows * job.new_tokens
    if job.needs.whole_distributions:
        logits = WHOLE_TABLES * actions * size.vocab * FP32
    else:
        logits = tables_at_once(actions * size.vocab, compares=job.cost.compares)
    # attention mask: one fp32 number and two booleans per pair
    mask = actions * job.context * (FP32 + 2)
    # a CPU kernel copies the weight it multiplies by; the head's is the largest
    plain = not (job.hardware.gpu or cast_weights(job))
    reordered = size.head * size.weight_bytes if plain else 0
    transient = size.transient(max(job.compute_bytes, job.sampling_bytes))
    return gathered(job, gradients=gradients) | {
        "weights for products": cast_weights(job),
        "logits": logits,
        "work space": tokens * transient + mask + reordered,
    }


def gradients(job: Job, size: float) -> dict[str, float]:
    """Gradients outside DDP's buckets."""
    return {} if buckets(job) else {"gradients": 0.0 if job.hardware.offload else size}


def gathered(job: Job, *, whole: bool = False, gradients: bool = False) -> dict[str, float]:
    """Sharded weights while they are gathered."""
    used = job.size.gathered(whole=whole, gradients=gradients) if job.hardware.sharded else 0.0
    return {"gathered weights": used}


def head_gradient(job: Job) -> float:
    """The gradient of the head's weights, if they train."""
    return job.size.head * job.size.weight_bytes if job.size.trained > job.size.linear else 0


def vectors(job: Job) -> float:
    """Vectors of a trust region."""
    return job.cost.vectors * job.size.trained * FP32


def cast_weights(job: Job) -> float:
    """Copies of the weights in the precision of the products, which autocast makes once per iteration."""
    casts = job.compute_bytes < job.size.weight_bytes
    return (job.size.linear + job.size.head) * job.compute_bytes if casts else 0.0
