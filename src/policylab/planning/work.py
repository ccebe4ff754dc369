"""What an iteration costs in arithmetic, and how long that takes at given rates."""

from __future__ import annotations

from dataclasses import dataclass

from policylab.planning.job import Job
from policylab.planning.memory import optimized_bytes, state_bytes

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
    trained: int  #: tokens that go through a backward pass
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
    batch, processes = job.batch, job.hardware.processes
    flops = {"rollout": rollout(job), "evaluation": evaluation(job), "update": update(job)}
    flops = {name: value for name, value in flops.items() if value}
    seconds = {name: value / processes / rates.flops for name, value in flops.items()}
    calls = {
        "rollout": batch.new_tokens * batch.samples * job.pieces,
        "evaluation": job.method.forwards * job.tokens(job.sequences) / job.limit,
        "update": 3 * batch.updates * job.micro_batches,
    }
    for name in seconds:
        seconds[name] += calls[name] * job.shape.layers * CALL
    if "rollout" in seconds:  # each step reads all weights, however few rows there are
        weights = (job.shape.linear + job.shape.head) * job.sampling_bytes
        read = batch.new_tokens * job.pieces * weights / rates.bandwidth
        seconds["rollout"] = max(seconds["rollout"], read)
    # Weights, gradients and the optimizer's state are read, all but the gradients written.
    moved = 3 * optimized_bytes(job) + 2 * state_bytes(job)
    spread = processes if job.hardware.sharded else 1
    seconds["update"] += batch.updates * moved / spread / rates.bandwidth
    tokens = batch.sequences * batch.new_tokens * batch.samples
    trained = round(batch.passes * batch.sequences * batch.new_tokens)
    return Work(tokens, trained, flops, seconds)


def exchanged(job: Job) -> float:
    """Bytes that a process receives an iteration from the others: gradients of each update or, where weights are
    sharded, these for each pass and the weights for each pass, forward and back."""
    if job.hardware.processes == 1:
        return 0.0
    gradients = job.batch.updates * optimized_bytes(job)
    if not job.hardware.sharded:
        return 2 * gradients
    whole = job.shape.parameters * job.shape.weight_bytes
    evaluations = job.method.forwards * max(1.0, job.tokens(job.sequences) / job.limit)
    passes = job.batch.updates * job.micro_batches
    return (job.batch.samples + evaluations + 2 * passes) * whole + job.micro_batches * gradients


def trunk(job: Job, tokens: float, layers: int) -> float:
    """A forward pass of so many tokens through so many layers."""
    shape = job.shape
    context = job.batch.prompt_tokens + job.batch.new_tokens / 2
    attention = 4 * context * shape.heads * shape.head_dim
    return tokens * layers * (2 * (shape.linear + shape.adapters) / shape.layers + attention)


def actions(job: Job) -> float:
    """Tokens that an iteration asks the head for."""
    return float(job.batch.sequences * job.batch.new_tokens)


def read_tokens(job: Job) -> float:
    """That an iteration's sequences have, as a model reads them, over all processes."""
    return job.tokens(job.sequences) * job.hardware.processes


def forward(job: Job) -> float:
    """A forward pass of the policy over an iteration's sequences."""
    return trunk(job, read_tokens(job), job.shape.layers) + 2 * job.shape.head * actions(job)


def rollout(job: Job) -> float:
    """Prompts are read once (a group's share them), and each token is written once."""
    batch = job.batch
    if not batch.samples:
        return 0.0
    tokens = batch.prompts * batch.prompt_tokens + batch.sequences * batch.new_tokens
    return trunk(job, tokens, job.shape.layers) + 2 * job.shape.head * actions(job)


def evaluation(job: Job) -> float:
    """The reference, log-probs once more, and values that do not come with sampling."""
    values = trunk(job, read_tokens(job), job.critic.layers) if job.critic else 0.0
    return job.method.forwards * forward(job) + values


def update(job: Job) -> float:
    """Forward and backward passes; a backward pass is one for inputs and one for the weights that train."""
    shape = job.shape
    weights = 0.0 if shape.adapters else shape.trained / shape.parameters
    again = 1 if job.hardware.gradient_checkpointing else 0
    critic = 3 * trunk(job, read_tokens(job), job.critic.layers) if job.critic else 0.0
    return job.batch.passes * ((2 + weights + again) * forward(job) + critic)
