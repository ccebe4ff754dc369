"""``plan=true``: prints memory, compute and time of a run, and does not run it."""

from __future__ import annotations

import torch
from omegaconf import DictConfig

from policylab.callbacks.tables import console
from policylab.config.checks import check
from policylab.distributed.world import world
from policylab.errors import UserError, check_range
from policylab.models.size import FP32
from policylab.planning.advice import together
from policylab.planning.job import Job
from policylab.planning.memory import GIB, main_memory, peak
from policylab.planning.probe import probe
from policylab.planning.read import describe
from policylab.planning.show import show
from policylab.planning.work import Rates
from policylab.rollouts.products import choose_products


def plan_job(config: DictConfig) -> None:
    """Prints the plan of a run. No weights are loaded and no file is written.

    Raises:
        UserError: when the config is wrong, or the run would not fit, with the reason and settings that help.
    """
    check(config)
    for key in ("plan_memory", "plan_flops"):
        if isinstance(config[key], str | bool):
            raise UserError(f"{key}={config[key]} is not a number")
        check_range(key, config[key], 0, above=True)
    described = describe(config)
    if world().main:
        console().quiet = False  # the plan is this command's only output, so it is printed in any case
        show(console(), config, described, rates_for(config, described.job))
    if problem := problem_of(described.job):
        raise UserError(problem)


def problem_of(job: Job) -> str | None:
    """What does not fit and which settings help, in one line; None if all fits."""
    most, memory = peak(job), job.hardware.memory
    if most.total <= memory:
        host = job.hardware.host_memory
        if host is not None and main_memory(job) > host:
            return (
                f"the plan does not fit: {main_memory(job) / GIB:.0f} GiB of main memory for libraries, a checkpoint's "
                f"copy and what is offloaded, but the machine has {host / GIB:.0f}; take fewer hardware.devices, or "
                "callbacks.checkpoint=null"
            )
        return None
    part, size = max(most.parts.items(), key=lambda item: item[1])
    line = (
        f"the plan does not fit: the {most.name} takes {most.total / GIB:.1f} GiB a process, and there are "
        f"{memory / GIB:.1f}; most of it, {size / GIB:.1f}, is {part}"
    )
    several = together(job)
    if several is not None:
        return f"{line}; take {several.words}"
    if part in ("gathered weights", "vLLM"):
        return (
            f"{line}: rollouts read the whole model on each GPU, whichever engine samples, and neither fsdp nor LoRA "
            "changes that; take GPUs of more memory or a smaller model"
        )
    return f"{line}; take a smaller model, shorter completions or more memory"


def rates_for(config: DictConfig, job: Job) -> Rates:
    """The speed of a process: as configured, else measured here. Processes on a CPU share its cores."""
    if config.plan_flops is not None:
        return Rates.of(float(config.plan_flops))
    gpu = job.hardware.gpu
    if gpu and not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here to measure; say how fast one is: plan_flops=4e14 (operations a second that it "
            "reaches in large products, some 40 % of its data sheet's)"
        )
    choose_products(config.hardware.products)
    rates = probe(gpu, torch.float32 if job.compute_bytes == FP32 else torch.bfloat16)
    sharing = 1 if gpu else job.hardware.local
    return Rates(rates.flops / sharing, rates.bandwidth / sharing)
