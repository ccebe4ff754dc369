"""Prints a plan."""

from __future__ import annotations

import math
from collections.abc import Sequence

from omegaconf import DictConfig
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from policylab.callbacks.tables import duration, rows
from policylab.planning.advice import Knob, helpful, together
from policylab.planning.job import Job
from policylab.planning.memory import GIB, Moment, main_memory, moments
from policylab.planning.read import Described
from policylab.planning.work import Rates, Work, exchanged, work

#: Planned and measured peaks have differed by up to a quarter, so a plan above this fraction of the memory fits
#: narrowly.
NARROW = 0.8
#: Example bandwidth between processes, in GiB per second, for the time of communication.
LINK = 100


def show(out: Console, config: DictConfig, described: Described, rates: Rates) -> None:
    """The whole plan: the run, memory by moment, compute and time, and settings that help."""
    job = described.job
    found = moments(job)
    needed = work(job, rates)
    out.print("plan")
    out.print(rows([(f"  {label}", value) for label, value in what_runs(config, described)]))
    out.print(memory_table(found, job))
    out.print(work_table(needed))
    out.print(rows([(f"  {label}", value) for label, value in length(config, job, needed, rates)]))
    if job.hardware.gpu:
        host = f"{main_memory(job) / GIB:,.0f} GiB a machine, libraries and a checkpoint's copy"
        out.print(rows([("  main memory", host)]))
    most = max(found, key=lambda moment: moment.total)
    out.print(rows([("  verdict", verdict(most, job))]))
    if most.total > NARROW * job.hardware.memory and (turns := knob_lines(job)):
        out.print(rows([("  turn" if i == 0 else "", line) for i, line in enumerate(turns)]))


def what_runs(config: DictConfig, described: Described) -> list[tuple[str, str]]:
    """Model, machine and batch."""
    job = described.job
    size, hardware, plan = job.size, job.hardware, job.plan
    trained = "" if size.trained == size.parameters else f", of which {size.trained:,} are trained"
    if size.adapters:
        trained = f", and {size.adapters:,} of adapters, which are trained"
    if hardware.gpu:
        device = f"GPU of {hardware.memory / GIB:.0f} GiB"
    else:
        device = f"process on the CPU with {hardware.memory / GIB:.1f} GiB of main memory"
    strategy = "" if plan.processes == 1 else f", {'fsdp' if hardware.sharded else 'ddp'}"
    machines = plan.processes // hardware.local
    where = f"{plan.processes} x {device}" + (f" on {machines} machines" if machines > 1 else "")
    counted = ", counted by another tokenizer, as the model has none here" if described.stand_in else ""
    prompt = f"{job.prompt_tokens:.0f} a prompt (at most {job.longest_prompt})"
    cut = f", sampled {job.rows} at a time in {job.pieces} pieces" if job.pieces > 1 and job.samples else ""
    critic = job.critic_size
    own = [("critic", f"{critic.parameters:,} parameters of its own")] if critic else []
    return [
        ("model", f"{config.model.name}: {described.source}"),
        ("parameters", f"{size.parameters:,}{trained}"),
        *own,
        ("hardware", f"{where}, {hardware.precision}{strategy}"),
        *plan.table(),
        ("tokens", f"{prompt}, {job.new_tokens} a completion{cut}{counted}"),
        (
            "passes",
            f"{job.pass_tokens:,.0f} tokens at most, {job.micro_batches} to an update on each process",
        ),
    ]


def memory_table(found: Sequence[Moment], job: Job) -> Table:
    """One row per part, one column per moment."""
    large = max(moment.total for moment in found) >= 10 * GIB
    unit, name, digits = (GIB, "GiB", 1) if large else (2**20, "MiB", 0)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column(f"memory of a process, {name}", footer="in all")
    for moment in found:
        table.add_column(moment.name, justify="right", footer=f"{moment.total / unit:,.{digits}f}")
    for part in dict.fromkeys(name for moment in found for name in moment.parts):
        sizes = [moment.parts.get(part, 0.0) for moment in found]
        table.add_row(part, *(f"{size / unit:,.{digits}f}" if size else "-" for size in sizes))
    return table


def work_table(needed: Work) -> Table:
    """Operations and seconds by phase."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("an iteration", footer="in all")
    table.add_column("operations", justify="right", footer=f"{needed.total_flops:.2e}")
    table.add_column("time", justify="right", footer=seconds(needed.total_seconds))
    for name, flops in needed.flops.items():
        table.add_row(name, f"{flops:.2e}", seconds(needed.seconds[name]))
    return table


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
    later = f"{sent:,.1f} GiB reach each process an iteration; not in the times: at {LINK} GiB a second, "
    traffic = [("exchange", f"{later}{seconds(sent / LINK)} more")] if sent else []
    return [
        ("an iteration", f"{needed.tokens:,} tokens sampled at most, {job.plan.updates} updates"),
        ("speed", f"{speed}; {rates.bandwidth / GIB:,.0f} GiB of memory read a second"),
        *traffic,
        ("the run", f"{iterations} iterations and their validations, {duration(total)} at least"),
    ]


def verdict(most: Moment, job: Job) -> str:
    """Whether it fits, in a few words."""
    share = most.total / job.hardware.memory
    words = f"{most.total / GIB:.1f} of {job.hardware.memory / GIB:.1f} GiB in the {most.name}"
    if share > 1:
        return f"does not fit: {words}"
    return (
        f"fits: {words}" if share <= NARROW else f"fits narrowly, and plans may be off by a quarter: {words}"
    )


def knob_lines(job: Job) -> list[str]:
    """The peak with each change alone; and with several, if no single one is enough."""
    found = helpful(job)
    lines = [effect(knob) for knob in found]
    if found and not found[0].fits and (several := together(job)) is not None:
        lines.append(effect(several))
    return lines


def effect(knob: Knob) -> str:
    """A change and the resulting peak."""
    return f"{knob.words}: {knob.peak / GIB:.1f} GiB" + (", fits" if knob.fits else "")


def seconds(value: float) -> str:
    """A duration; short ones with decimals."""
    return f"{value:.2g} s" if value < 10 else duration(value)
