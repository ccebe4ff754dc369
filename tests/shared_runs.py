"""Runs the same small trainings on one process and on two, and records both for comparison.

The two processes start only once, for all cases, because a start takes longer than any case.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from small_runs import algo, flat, levels, quiet, small

PROCESSES = 2
#: A process that waits longer than this for the other one has hung.
TIMEOUT = timedelta(seconds=60)
CHECKPOINT = "half.ckpt"


@dataclass(frozen=True)
class Case:
    """A training of five iterations.

    Attributes:
        options: other options of the preset's axes, such as ``algo/kl=none``.
        changes: overrides of the small config; ``shared``: additional ones on two processes.
        twist: name of a function below that changes the module before training; on one process only if it is in
            `EVERYWHERE`.
        validates: whether to run with preflight, validation and samples, as a real run does.
        task: its reward is replaced by `levels`, an environment's is not.
        resumes: whether to resume after the third iteration on another number of processes; the record "NAME resumed"
            has the iterations after it.
    """

    preset: str
    options: tuple[str, ...] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=lambda: {"optim.micro_batch_tokens": 20})
    twist: str | None = None
    validates: bool = False
    task: str = "random_walks"
    resumes: bool = False


@dataclass(frozen=True)
class Record:
    """The record of one process.

    Attributes:
        rollouts: prompt, tokens and reward of each sequence, by iteration.
        gradients: gradient of each step, flat.
        metrics: metrics of each iteration and validation, without timings.
        start: all weights before training, also of the reference and the target network; ``end``: after training.
        memory: replay memory of Q-learning.
        passes: number of forward passes of the language model with gradients.
        samples: lines of ``samples.jsonl``.
        micro_batch_tokens: token budget of a micro-batch at the end.
    """

    rollouts: list[list[tuple[int, list[int], float]]]
    gradients: list[Tensor]
    metrics: list[dict[str, float]]
    start: Tensor
    end: Tensor
    memory: dict[str, Tensor]
    passes: int
    samples: str
    micro_batch_tokens: int


class Half(Callback):
    """Saves the state after the third iteration."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CHECKPOINT

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.iteration == 3:
            trainer.save_checkpoint(self.path)


def run(case: Case, folder: Path, processes: int, checkpoint: Path | None = None) -> Record:
    """Trains as one of this many processes."""
    from policylab.callbacks.samples import Samples
    from policylab.config.build import build

    changes = {"iterations": 5, **case.changes}
    if case.validates:
        changes |= {
            "validation.every": 2,
            "validation.prompts": 7,
            "validation.batch_size": 3,
            "task.held_out": 7,
        }
    if processes > 1:
        changes |= {"hardware.devices": processes, "hardware.strategy": "ddp", **case.shared}
    folder.mkdir(parents=True, exist_ok=True)
    with quiet():
        experiment = build(small(algo(case.preset, *case.options), changes, case.task), folder)
    module, trainer = experiment.module, experiment.trainer
    if case.task == "random_walks":
        module.sampler.scorer.reward = levels
    if case.validates:
        trainer.callbacks.append(Samples(str(folder), every=1, keep=20, show=0))
    else:
        trainer.limit_val_batches = 0
        module._checked = True
    if case.resumes and checkpoint is None:
        trainer.callbacks.append(Half(folder))
    record = Record([], [], [], flat(module.parameters()), torch.zeros(0), {}, 0, "", 0)
    passes = watch(module, record)
    if case.twist in EVERYWHERE or (case.twist is not None and processes > 1):
        TWISTS[case.twist](module)
    with quiet():
        trainer.fit(module, datamodule=experiment.data, ckpt_path=checkpoint, weights_only=True)
    samples = folder / "samples.jsonl"
    return Record(
        rollouts=record.rollouts,
        gradients=record.gradients,
        metrics=record.metrics,
        start=record.start,
        end=flat(module.parameters()),
        memory=module.replay.memory.state() if hasattr(module, "replay") else {},
        passes=len(passes),
        samples=samples.read_text() if samples.exists() else "",
        micro_batch_tokens=module.passes.tokens,
    )


def watch(module: Any, record: Record) -> list[None]:
    """Makes the module fill the record. The returned list grows by one with each forward pass with gradients."""
    note, step, passes = module.record, module.stepper.apply_gradients, list[None]()

    def noted(metrics: dict[str, float]) -> None:
        note(metrics)
        record.metrics.append({k: v for k, v in metrics.items() if not k.startswith("perf/")})
        if "train/lr" in metrics and module.rollout is not None:
            record.rollouts.append(sequences(module.rollout))

    def stepped(*args: Any) -> bool:
        record.gradients.append(flat(p.grad for p in module.policy.parameters() if p.grad is not None))
        return step(*args)

    module.record, module.stepper.apply_gradients = noted, stepped
    module.policy.lm.register_forward_pre_hook(
        lambda *_: passes.append(None) if torch.is_grad_enabled() else None
    )
    if hasattr(getattr(module, "updater", None), "natural_step"):  # its gradient is never in ``.grad``
        natural_step = module.updater.natural_step

        def directed(actor: Any, rollout: Any, gradient: Tensor) -> Any:
            record.gradients.append(gradient.clone())
            return natural_step(actor, rollout, gradient)

        module.updater.natural_step = directed
    return passes


def sequences(rollout: Any) -> list[tuple[int, list[int], float]]:
    """Prompt, tokens and reward of each row of a rollout."""
    rows = zip(rollout.prompt_ids, rollout.tokens, rollout.lengths, rollout.rewards, strict=True)
    return [(int(p), tokens[:length].tolist(), float(reward)) for p, tokens, length, reward in rows]


# -- twists ----------------------------------------------------------------------------------------------


def sums_are_local(module: Any) -> None:
    """Each process sums only over its own part. Gradients are still averaged."""
    module.runtime._reduce = lambda x, operation: x


def memory_runs_out(module: Any) -> None:
    """Raises an out-of-memory error on the second process, in the third update, before it sends gradients."""
    loss, calls = module.updater.loss, []

    def tight(rollout: Any, denominator: Tensor) -> Tensor:
        calls.append(None)
        if module.global_rank == 1 and len(rollout) > 1 and len(calls) >= 3 and not module.halved:
            module.halved = True
            raise torch.OutOfMemoryError("as a GPU would say it")
        return loss(rollout, denominator)

    module.halved, module.updater.loss = False, tight


def passes_are_shared(module: Any) -> None:
    """Behaves as with sharded weights, where every forward pass needs all processes."""
    module.sharded = True


def a_row_is_not_finite(module: Any) -> None:
    """Makes the advantages of the first sequence of the second iteration infinite or NaN."""
    update = module.updater.update

    def broken(rollout: Any) -> None:
        advantages = rollout.advantages.clone()
        if module.iteration == 1 and module.global_rank == 0:
            advantages[0] /= 0.0
        update(rollout.replace(advantages=advantages))

    module.updater.update = broken


TWISTS = {f.__name__: f for f in (sums_are_local, memory_runs_out, passes_are_shared, a_row_is_not_finite)}
EVERYWHERE = ("a_row_is_not_finite",)


# -- two processes ---------------------------------------------------------------------------------------


def on_both(cases: Mapping[str, Case], folder: Path) -> tuple[dict[str, Record], list[dict[str, Record]]]:
    """Runs every case on one process and on two; returns the records of the one, and of each of the two."""
    resumed = [name for name, case in cases.items() if case.resumes]
    alone = {name: run(cases[name], folder / "alone" / name, 1) for name in resumed}
    work = partial(take_part, cases=cases, folder=folder)
    together = torch.multiprocessing.start_processes(work, nprocs=PROCESSES, join=False, start_method="fork")
    alone |= {
        name: run(case, folder / "alone" / name, 1) for name, case in cases.items() if name not in alone
    }
    while not together.join():
        pass
    for name in resumed:
        alone[f"{name} resumed"] = run(
            cases[name], folder / "alone" / name, 1, folder / "0" / name / CHECKPOINT
        )
    return alone, [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def take_part(rank: int, cases: Mapping[str, Case], folder: Path) -> None:
    """The work of one of the two processes."""
    size = {"WORLD_SIZE": PROCESSES, "LOCAL_WORLD_SIZE": PROCESSES, "RANK": rank, "LOCAL_RANK": rank}
    here = {"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    os.environ.update(here | {name: str(value) for name, value in size.items()})
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES, timeout=TIMEOUT
    )
    seen = {name: run(case, folder / str(rank) / name, PROCESSES) for name, case in cases.items()}
    for name in [name for name, case in cases.items() if case.resumes]:
        seen[f"{name} resumed"] = run(
            cases[name], folder / str(rank) / name, PROCESSES, folder / "alone" / name / CHECKPOINT
        )
    torch.save(seen, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def joined(parts: Sequence[Record]) -> list[list[tuple[int, list[int], float]]]:
    """The rollouts of all processes, concatenated by iteration."""
    return [
        [row for part in rollouts for row in part]
        for rollouts in zip(*(p.rollouts for p in parts), strict=True)
    ]
