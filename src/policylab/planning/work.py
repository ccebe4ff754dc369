"""What an iteration costs in arithmetic, and how long that takes at given rates."""

from __future__ import annotations

from dataclasses import dataclass

from policylab.planning.job import Job

#: Floating-point operations that an accelerator does in the time in which it reads a byte: 150 to 300 for today's. It
#: says how fast memory is where only ``plan_flops`` is given.
INTENSITY = 200
#: Seconds of Python and kernel launches that a layer costs a forward pass at least.
CALL = 2e-4


@dataclass(frozen=True)
class Rates:
    """How fast a process is."""

    flops: float  #: floating-point operations a second, in large products
    bandwidth: float  #: bytes a second that it reads from memory

    @classmethod
    def of(cls, flops: float) -> Rates:
        """An accelerator of which only this is known."""
        return cls(flops, flops / INTENSITY)


@dataclass(frozen=True)
class Work:
    """An iteration, all processes together; seconds are of the slowest, that is of each."""

    tokens: int  #: sampled, at most
    flops: dict[str, float]
    seconds: dict[str, float]

    @property
    def total_flops(self) -> float:
        return sum(self.flops.values())

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds.values())


def work(job: Job, rates: Rates) -> Work:
    """Operations and seconds of an iteration, by phase."""
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
    if job.samples:  # each step reads all weights, however few rows there are
        weights = (job.size.linear + job.size.head) * job.sampling_bytes
        read = job.new_tokens * job.pieces * weights / rates.bandwidth
        seconds["rollout"] = max(seconds["rollout"], read)
    # Weights, gradients and the optimizer's state are read, all but the gradients written.
    moved = 3 * job.gradients + 2 * job.state
    seconds["update"] += plan.updates * moved / job.spread / rates.bandwidth
    return Work(plan.sequences * job.new_tokens * job.samples, flops, seconds)


def operations(job: Job) -> dict[str, float]:
    """Of each phase, over all processes."""
    plan, size, cost = job.plan, job.size, job.cost
    context = job.prompt_tokens + job.new_tokens / 2
    actions = plan.sequences * job.new_tokens
    read = (
        job.tokens(job.sequences) * plan.processes
    )  # tokens of an iteration's sequences, as a model reads them
    forward = size.operations(read, size.layers, context) + 2 * size.head * actions
    values = size.operations(read, job.critic_layers, context)
    # A backward pass is one for inputs and one for the weights that train.
    weights = 0.0 if size.adapters else size.trained / size.parameters
    passes = 2 + weights + job.hardware.gradient_checkpointing
    # Prompts are read once (a group's share them), and each token is written once.
    sampled = size.operations(plan.prompts * job.prompt_tokens + actions, size.layers, context)
    return {
        "rollout": (sampled + 2 * size.head * actions) * job.samples,
        "evaluation": cost.forwards * forward + values,
        "update": cost.passes * (passes * forward + 3 * values),
    }


def exchanged(job: Job) -> float:
    """Bytes that a process receives an iteration from the others: gradients of each update or, where weights are
    sharded, these for each pass and the weights for each pass, forward and back."""
    if job.plan.processes == 1:
        return 0.0
    gradients = job.plan.updates * job.gradients
    if not job.hardware.sharded:
        return 2 * gradients
    evaluations = job.cost.forwards * max(1.0, job.tokens(job.sequences) / job.limit)
    passes = job.plan.updates * job.micro_batches
    weights = job.size.parameters * job.size.weight_bytes
    return (job.samples + evaluations + 2 * passes) * weights + job.micro_batches * gradients
