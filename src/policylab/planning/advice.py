"""Settings that make a run fit: changes each setting in the plan, and computes the peak again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from policylab.data.plan import BatchPlan
from policylab.errors import UserError
from policylab.models.size import BF16, FP32
from policylab.planning.job import Job
from policylab.planning.memory import peak
from policylab.runs.words import override_key

#: Settings that save less than this fraction of the peak are not listed.
WORTH = 0.03


@dataclass(frozen=True)
class Change:
    """A change of one or more settings."""

    overrides: str
    job: Job  #: the run with the change

    @property
    def key(self) -> str:
        """The config key that a run needs for the change: ``algo.kl`` of ``algo/kl=none algo/reference=none``."""
        return override_key(self.overrides.split()[0]).replace("/", ".")

    @property
    def peak(self) -> float:
        return peak(self.job).total

    @property
    def fits(self) -> bool:
        return self.peak <= self.job.hardware.memory


def helpful(job: Job) -> list[Change]:
    """Changes of this run's settings that lower the peak, the best first."""
    now = peak(job).total
    found = (change for change in changes(job) if change.key in job.keys)
    return sorted((c for c in found if c.peak < (1 - WORTH) * now), key=lambda change: change.peak)


def together(job: Job) -> Change | None:
    """Adds the best next change until the run fits; None if it never does."""
    overrides = list[str]()
    while peak(job).total > job.hardware.memory:
        found = helpful(job)
        if not found:
            return None
        overrides.append(found[0].overrides)
        job = found[0].job
    return Change(" ".join(overrides), job)


def changes(job: Job) -> Iterator[Change]:
    """All possible changes, each with the resulting run."""
    size, hardware, plan, needs = job.size, job.hardware, job.plan, job.needs
    moving, critic = needs.reference == "moving", job.critic_size
    if not hardware.gradient_checkpointing:
        on = replace(hardware, gradient_checkpointing=True)
        # automatic micro-batches would grow and use the saved memory
        size_kept = "" if job.micro_batch_tokens else f" optim.micro_batch_tokens={job.limit}"
        overrides = f"hardware.gradient_checkpointing=true{size_kept}"
        yield Change(overrides, replace(job, hardware=on, micro_batch_tokens=job.limit))
    if (fewer := max(job.context, int(job.pass_tokens) // 4)) < job.pass_tokens:
        yield Change(f"optim.micro_batch_tokens={fewer}", replace(job, micro_batch_tokens=fewer))
    rows = min(job.rows, max(job.samples * job.sequences, job.validation // plan.processes))
    if rows > 1:
        yield Change(f"rollout.max_rows={rows // 2}", replace(job, max_rows=rows // 2))
    if size.weight_bytes == FP32 and not job.cost.vectors:
        on, half = replace(hardware, precision="bf16-true"), replace(size, weight_bytes=BF16)
        yield Change(
            "hardware.precision=bf16-true", replace(job, size=half, hardware=on, sampling_bytes=BF16)
        )
    if not (size.adapters or moving or hardware.sharded or critic.separate):
        adapted = replace(size, trained=size.lora, adapters=size.lora)
        yield Change("model/adapter=lora", replace(job, size=adapted))
    if plan.processes > 1 and hardware.gpu and not (hardware.sharded or size.adapters or job.cost.vectors):
        yield Change("hardware.strategy=fsdp", replace(job, hardware=replace(hardware, sharded=True)))
    if hardware.sharded and hardware.gpu and not hardware.offload:
        yield Change("hardware.cpu_offload=true", replace(job, hardware=replace(hardware, offload=True)))
    if hardware.gpu and (more := other(plan, processes=2 * plan.processes)):
        yield Change(f"hardware.num_nodes={more.processes // hardware.local}", replace(job, plan=more))
    if needs.reference == "frozen" and not (size.adapters or needs.target):
        yield Change("algo/kl=none algo/reference=none", replace(job, needs=replace(needs, reference="none")))
    if critic.layers and not needs.target:
        shared = replace(critic, parameters=size.hidden + 1, layers=0, separate=False)
        yield Change("algo/critic=shared_trunk", replace(job, critic_size=shared))
    if job.samples and plan.prompts % 2 == 0 and (less := other(plan, prompts=plan.prompts // 2)):
        yield Change(f"rollout.prompts={less.prompts}", replace(job, plan=less))
    if job.validation > 2 * plan.processes:
        fewer = job.validation // 4
        yield Change(f"validation.batch_size={fewer}", replace(job, validation=fewer))


def other(plan: BatchPlan, **numbers: int) -> BatchPlan | None:
    """The batch plan with other numbers; None if they do not divide."""
    try:
        return replace(plan, **numbers)
    except UserError:
        return None
