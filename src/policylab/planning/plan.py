"""``plan=true``: prints memory, compute and time of a run, and does not run it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from policylab.callbacks.tables import console, rows
from policylab.config.checks import check, check_number
from policylab.distributed.world import world
from policylab.errors import UserError, counted
from policylab.models.size import FP32
from policylab.planning.advice import helpful, together
from policylab.planning.job import Job
from policylab.planning.memory import GIB, Moment, main_memory, moments, peak, reserved
from policylab.planning.read import describe
from policylab.planning.work import Rates, Work, exchanged, work
from policylab.rollouts.products import choose_products
from policylab.runs.figures import duration

#: Planned and measured peaks have differed by up to a quarter, so a plan above this fraction of the memory fits
#: narrowly.
NARROW = 0.8
#: Example bandwidth between processes, in GiB per second, for the time of communication.
LINK = 100


def plan_job(config: DictConfig) -> None:
    """Prints the plan of a run. No weights are loaded and no file is written.

    Raises:
        UserError: when the config is wrong, or the run would not fit, with the reason and settings that help.
    """
    check(config)
    for key in ("plan_memory", "plan_flops"):
        if config[key] is not None:
            check_number(key, config[key], 0, above=True)
    job = describe(config)
    if world().main:
        console().quiet = False  # the plan is this command's only output, so it is printed in any case
        show(console(), config, job, rates_for(config, job))
    if problem := problem_of(job):
        raise UserError(problem)


def rates_for(config: DictConfig, job: Job) -> Rates:
    """The speed of a process: as configured, else measured here. Processes on a CPU share its cores."""
    if config.plan_flops is not None:
        return Rates.of(float(config.plan_flops))
    gpu = job.hardware.gpu
    if gpu and not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here to measure; set the speed of one: plan_flops=4e14 (operations a second that it "
            "reaches in large products, about 40 % of its data sheet's)"
        )
    choose_products(config.hardware.products)
    rates = Rates.measured(gpu, torch.float32 if job.compute_bytes == FP32 else torch.bfloat16)
    sharing = 1 if gpu else job.hardware.local
    return Rates(rates.flops / sharing, rates.bandwidth / sharing)


def problem_of(job: Job) -> str | None:
    """What does not fit and which settings help, in one line; None if all fits."""
    most, memory, host = peak(job), job.hardware.memory, job.hardware.host_memory
    if most.total <= memory:
        if host is None or main_memory(job) <= host:
            return None
        return (
            f"the plan does not fit: {main_memory(job) / GIB:.0f} GiB of main memory for libraries, a copy of the "
            f"checkpoint and offloaded weights, but the machine has {host / GIB:.0f}; take fewer hardware.devices, or "
            "callbacks.checkpoint=null"
        )
    part, size = max(most.parts.items(), key=lambda item: item[1])
    advice = "take a smaller model, shorter completions or more memory"
    if several := together(job):
        advice = f"take {several.overrides}"
    elif part == "gathered weights" or part in reserved(job):
        part += ": with every engine, rollouts need the whole model on each GPU, also with fsdp or LoRA"
        advice = "take GPUs of more memory or a smaller model"
    return (
        f"the plan does not fit: the {most.name} takes {most.total / GIB:.1f} of {memory / GIB:.1f} GiB on each "
        f"process; the largest part, {size / GIB:.1f} GiB, is {part}; {advice}"
    )


# -- on the console ----------------------------------------------------------------------------------------------


def show(out: Console, config: DictConfig, job: Job, rates: Rates) -> None:
    """The whole plan: the run, memory by moment, compute and time, and settings that help."""
    found, needed = moments(job), work(job, rates)
    most = max(found, key=lambda moment: moment.total)
    closing = [("verdict", verdict(most, job))]
    if job.hardware.gpu:
        host = f"{main_memory(job) / GIB:,.0f} GiB a machine, with libraries and a copy of the checkpoint"
        closing.insert(0, ("main memory", host))
    if most.total > NARROW * job.hardware.memory:
        closing += [("change" if i == 0 else "", line) for i, line in enumerate(change_lines(job))]
    out.print("plan")
    out.print(indented(what_runs(config, job)))
    out.print(memory_table(found))
    out.print(work_table(needed))
    out.print(indented(length(config, job, needed, rates)))
    out.print(indented(closing))


def indented(pairs: Sequence[tuple[str, str]]) -> Table:
    """Labels and values below a heading."""
    return rows([(f"  {label}", value) for label, value in pairs])


def what_runs(config: DictConfig, job: Job) -> list[tuple[str, str]]:
    """Model, machine and batch."""
    size, hardware, plan = job.size, job.hardware, job.plan
    trained = "" if size.trained == size.parameters else f", of which {size.trained:,} are trained"
    if size.adapters:
        trained = f", and {size.adapters:,} of adapters, which train"
    if hardware.gpu:
        device = f"GPU of {hardware.memory / GIB:.0f} GiB"
    else:
        device = f"process on the CPU with {hardware.memory / GIB:.1f} GiB of main memory"
    strategy = "" if plan.processes == 1 else f", {'fsdp' if hardware.sharded else 'ddp'}"
    machines = plan.processes // hardware.local
    where = f"{plan.processes} x {device}" + (f" on {machines} machines" if machines > 1 else "")
    by = ", counted with another tokenizer, because the model's is not here" if job.stand_in else ""
    prompt = f"{job.prompt_tokens:.0f} a prompt (at most {job.longest_prompt})"
    cut = f", sampled {job.rows} at a time in {job.pieces} pieces" if job.pieces > 1 and job.samples else ""
    critic = job.critic_size.parameters
    passes = f"{job.pass_tokens:,.0f} tokens at most, {job.micro_batches} an update on each process"
    return [
        ("model", f"{config.model.name}: {job.source}"),
        ("parameters", f"{size.parameters:,}{trained}"),
        *([("critic", f"{critic:,} additional parameters")] if critic else []),
        ("hardware", f"{where}, {hardware.precision}{strategy}"),
        *plan.table(),
        ("tokens", f"{prompt}, {job.new_tokens} a completion{cut}{by}"),
        ("passes", passes),
    ]


def sums(title: str, heads: Sequence[str], body: Mapping[str, Sequence[str]], total: Sequence[str]) -> Table:
    """A table of numbers with their totals below."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column(title, footer="in all")
    for head, whole in zip(heads, total, strict=True):
        table.add_column(head, justify="right", footer=whole)
    for name, cells in body.items():
        table.add_row(name, *cells)
    return table


def memory_table(found: Sequence[Moment]) -> Table:
    """One row per part, one column per moment."""
    large = max(moment.total for moment in found) >= 10 * GIB
    unit, name, digits = (GIB, "GiB", 1) if large else (2**20, "MiB", 0)

    def cell(size: float) -> str:
        return f"{size / unit:,.{digits}f}" if size else "-"

    parts = dict.fromkeys(part for moment in found for part in moment.parts)
    body = {part: [cell(moment.parts.get(part, 0.0)) for moment in found] for part in parts}
    heads, totals = [moment.name for moment in found], [cell(moment.total) for moment in found]
    return sums(f"memory of a process, {name}", heads, body, totals)


def work_table(needed: Work) -> Table:
    """Operations and seconds by phase."""
    body = {name: (f"{flops:.2e}", seconds(needed.seconds[name])) for name, flops in needed.flops.items()}
    totals = f"{sum(needed.flops.values()):.2e}", seconds(needed.total_seconds)
    return sums("an iteration", ("operations", "time"), body, totals)


def length(config: DictConfig, job: Job, needed: Work, rates: Rates) -> list[tuple[str, str]]:
    """Tokens, speed, and the whole run."""
    iterations = config.iterations
    if config.max_tokens is not None and needed.tokens:
        iterations = min(iterations, math.ceil(config.max_tokens / needed.tokens))
    prompts = config.validation.prompts * (iterations // config.validation.every + 1)
    without_update = needed.total_seconds - needed.seconds.get("update", 0.0)
    total = iterations * needed.total_seconds + prompts * without_update / max(1, job.plan.sequences)
    known = "measured here" if config.plan_flops is None else "as given"
    speed = f"{rates.flops:.2g} operations a second and process, {known}"
    sent = exchanged(job) / GIB
    amount = f"{sent:,.1f} GiB to each process an iteration; at {LINK} GiB a second another "
    traffic = [("exchange", f"{amount}{seconds(sent / LINK)}, not in the times above")] if sent else []
    return [
        ("an iteration", f"{needed.tokens:,} tokens sampled at most, {counted(job.plan.updates, 'update')}"),
        ("speed", f"{speed}; {rates.bandwidth / GIB:,.0f} GiB of memory read a second"),
        *traffic,
        ("the run", f"{counted(iterations, 'iteration')} with validations, {duration(total)} at least"),
    ]


def verdict(most: Moment, job: Job) -> str:
    """Whether the run fits, with the memory of its largest moment."""
    share = most.total / job.hardware.memory
    narrowly = "fits" if share <= NARROW else "fits narrowly, and plans may be off by a quarter"
    words = f"{most.total / GIB:.1f} of {job.hardware.memory / GIB:.1f} GiB in the {most.name}"
    return f"{'does not fit' if share > 1 else narrowly}: {words}"


def change_lines(job: Job) -> list[str]:
    """The peak with each change alone, and with several if no single one is enough."""
    found = helpful(job)
    if found and not found[0].fits and (several := together(job)) is not None:
        found.append(several)
    return [f"{c.overrides}: {c.peak / GIB:.1f} GiB" + (", fits" if c.fits else "") for c in found]


def seconds(value: float) -> str:
    """A duration as text; short ones with decimals."""
    return f"{value:.2g} s" if value < 10 else duration(value)
