"""FLOPs and time of an iteration at given speeds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.benchmark import Timer

from policylab.functional.products import linear
from policylab.planning.job import Job

#: FLOPs that an accelerator does per byte of memory traffic: 150 to 300 today. Gives the memory bandwidth if only
#: ``plan_flops`` is set.
INTENSITY = 200
#: Least seconds of Python and kernel launches per layer and forward pass.
CALL = 2e-4
#: Settings of the measurement: seconds of each of two calls; rows and columns of the matrices, on a CPU and on a GPU;
#: bytes of a copy, more than any cache holds.
SECONDS, SIDE, GPU_SIDE, COPIED = 0.5, 1024, 8192, 2**28


@dataclass(frozen=True)
class Rates:
    """The speed of a process."""

    flops: float  #: FLOPs per second in large products
    bandwidth: float  #: bytes per second read from memory

    @classmethod
    def of(cls, flops: float) -> Rates:
        """An accelerator of which only the FLOPs per second are known."""
        return cls(flops, flops / INTENSITY)

    @classmethod
    def measured(cls, gpu: bool, dtype: torch.dtype) -> Rates:
        """This machine's, from products of large matrices by the library that training uses, and from copies."""
        device, side = ("cuda", GPU_SIDE) if gpu else ("cpu", SIDE)
        a = torch.ones(side, side, dtype=dtype, device=device)
        block = torch.ones(COPIED, dtype=torch.uint8, device=device)
        names = {"linear": linear, "a": a, "block": block, "other": torch.empty_like(block)}
        product, copy = (
            # the fastest call counts, so that other load on the machine matters less
            min(
                Timer(call, globals=names, num_threads=torch.get_num_threads())
                .blocked_autorange(min_run_time=SECONDS)
                .times
            )
            for call in ("linear(a, a, None)", "other.copy_(block)")
        )
        return cls(flops=2 * side**3 / product, bandwidth=2 * COPIED / copy)


@dataclass(frozen=True)
class Work:
    """Work of one iteration: tokens and FLOPs over all processes, seconds per process, which all take the same time."""

    tokens: int  #: most tokens sampled
    flops: dict[str, float]
    seconds: dict[str, float]

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def work(job: Job, rates: Rates) -> Work:
    """FLOPs and seconds of an iteration, by phase."""
    plan, processes = job.plan, job.plan.processes
    flops = {name: value for name, value in operations(job).items() if value}
    seconds = {name: value / processes / rates.flops for name, value in flops.items()}
    calls = {
        "rollout": job.new_tokens * job.pieces,
        "evaluation": job.cost.forwards * job.tokens(job.sequences) / job.limit,
        "update": 3 * plan.updates * job.micro_batches,
    }
    for name in seconds:
        seconds[name] += calls[name] * job.size.layers * CALL
    if job.samples:  # each decoding step reads all weights, for any number of rows
        weights = (job.size.linear + job.size.head) * job.sampling_bytes
        read = job.new_tokens * job.pieces * weights / rates.bandwidth
        seconds["rollout"] = max(seconds["rollout"], read)
    # reads weights, gradients and optimizer state; writes all but the gradients
    moved = 3 * job.gradients + 2 * job.state
    seconds["update"] += plan.updates * moved / job.spread / rates.bandwidth
    return Work(plan.sequences * job.new_tokens * job.samples, flops, seconds)


def operations(job: Job) -> dict[str, float]:
    """FLOPs of each phase, over all processes."""
    plan, size, cost = job.plan, job.size, job.cost
    context = job.prompt_tokens + job.new_tokens / 2
    actions = plan.sequences * job.new_tokens
    read = job.tokens(job.sequences) * plan.processes  # of an iteration's sequences
    forward = size.operations(read, size.layers, context) + 2 * size.head * actions
    values = size.operations(read, job.critic_size.layers, context)
    # a backward pass costs a forward pass for the inputs, and one for the trainable weights
    weights = 0.0 if size.adapters else size.trained / size.parameters
    passes = 2 + weights + job.hardware.gradient_checkpointing
    # each distinct prompt is read once, and each token is decoded once
    sampled = size.operations(plan.prompts * job.prompt_tokens + actions, size.layers, context)
    return {
        "rollout": (sampled + 2 * size.head * actions) * job.samples,
        "evaluation": cost.forwards * forward + values,
        "update": cost.passes * (passes * forward + 3 * values),
    }


def exchanged(job: Job) -> float:
    """Bytes that a process receives per iteration: gradients once per update; with sharded weights, gradients once per
    pass and weights twice per pass, forward and backward."""
    if job.plan.processes == 1:
        return 0.0
    gradients = job.plan.updates * job.gradients
    if not job.hardware.sharded:
        return 2 * gradients
    evaluations = job.cost.forwards * max(1.0, job.tokens(job.sequences) / job.limit)
    passes = job.plan.updates * job.micro_batches
    weights = job.size.parameters * job.size.weight_bytes
    return (job.samples + evaluations + 2 * passes) * weights + job.micro_batches * gradients
