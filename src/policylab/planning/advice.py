"""Which knob to turn when a run does not fit: each is turned in the numbers, and what comes out is told."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from policylab.planning.job import BF16, FP32, Job
from policylab.planning.memory import peak

#: A knob that saves less than this share of the peak is not worth naming.
WORTH = 0.03


@dataclass(frozen=True)
class Knob:
    """A change of the command line."""

    words: str
    job: Job  #: with it

    @property
    def peak(self) -> float:
        return peak(self.job).total

    @property
    def fits(self) -> bool:
        return self.peak <= self.job.hardware.memory


def helpful(job: Job) -> list[Knob]:
    """Knobs that lower the peak, the best first."""
    now = peak(job).total
    return sorted((k for k in knobs(job) if k.peak < (1 - WORTH) * now), key=lambda knob: knob.peak)


def together(job: Job) -> Knob | None:
    """Several knobs, the best one first and then the next best, until it fits; None when it never does."""
    words = list[str]()
    while peak(job).total > job.hardware.memory:
        found = helpful(job)
        if not found:
            return None
        words.append(found[0].words)
        job = found[0].job
    return Knob(" ".join(words), job)


def knobs(job: Job) -> Iterator[Knob]:
    """Everything that could be turned, with what it makes of the run."""
    shape, hardware, batch, method = job.shape, job.hardware, job.batch, job.method
    if not hardware.gradient_checkpointing:
        on = replace(hardware, gradient_checkpointing=True)
        # Automatic micro-batches would grow and take the memory again.
        fixed = replace(batch, limit=job.limit)
        words = "hardware.gradient_checkpointing=true"
        yield Knob(
            words if batch.limit else f"{words} optim.micro_batch_tokens={job.limit}",
            replace(job, hardware=on, batch=fixed),
        )
    longest = batch.longest_prompt + batch.new_tokens
    if (fewer := max(longest, int(job.pass_tokens) // 4)) < job.pass_tokens:
        yield Knob(f"optim.micro_batch_tokens={fewer}", replace(job, batch=replace(batch, limit=fewer)))
    rows = min(job.rows, max(batch.samples * job.sequences, batch.validation // hardware.processes))
    if job.engine != "vllm" and rows > 1:
        cut = replace(batch, max_rows=rows // 2)
        yield Knob(f"rollout.max_rows={cut.max_rows}", replace(job, batch=cut))
    if shape.weight_bytes == FP32 and not method.vectors:
        yield Knob(
            "hardware.precision=bf16-true",
            replace(
                job,
                shape=replace(shape, weight_bytes=BF16),
                hardware=replace(hardware, precision="bf16-true"),
                sampling_bytes=BF16,
            ),
        )
    if not shape.adapters and not method.moving and not (job.critic and job.critic.separate):
        yield Knob(
            "model/adapter=lora", replace(job, shape=replace(shape, trained=shape.lora, adapters=shape.lora))
        )
    if hardware.processes > 1 and not hardware.sharded and hardware.gpu:
        yield Knob("hardware.strategy=fsdp", replace(job, hardware=replace(hardware, sharded=True)))
    if hardware.sharded and hardware.gpu and not hardware.offload:
        yield Knob("hardware.cpu_offload=true", replace(job, hardware=replace(hardware, offload=True)))
    if hardware.gpu and batch.prompts % (2 * hardware.processes) == 0:
        nodes = hardware.processes // hardware.local
        twice = replace(hardware, processes=2 * hardware.processes)
        yield Knob(f"hardware.num_nodes={2 * nodes}", replace(job, hardware=twice))
    if method.reference and not shape.adapters and not method.moving and not method.target:
        yield Knob("algo/kl=none algo/reference=none", replace(job, method=replace(method, reference=False)))
    if job.critic is not None and job.critic.layers and not method.target:
        shared = replace(job.critic, parameters=shape.hidden + 1, layers=0, separate=False)
        yield Knob("algo/critic=shared_trunk", replace(job, critic=shared))
    if batch.samples and batch.prompts % (2 * hardware.processes) == 0:
        half = replace(batch, prompts=batch.prompts // 2, minibatch=batch.minibatch // 2)
        yield Knob(f"rollout.prompts={half.prompts}", replace(job, batch=half))
    if batch.validation > 2 * hardware.processes:
        less = replace(batch, validation=batch.validation // 4)
        yield Knob(f"validation.batch_size={less.validation}", replace(job, batch=less))
