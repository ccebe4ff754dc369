"""The number of jobs that run at once, and their GPUs."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass

from omegaconf import DictConfig

from policylab.config.hardware import AUTO, with_devices
from policylab.distributed.machine import cores, gpus
from policylab.sweeps.jobs import Job


@dataclass(frozen=True)
class Slot:
    """The share of the machine that a job uses."""

    processes: int
    gpus: tuple[str, ...] = ()  #: ids for CUDA_VISIBLE_DEVICES


class Slots:
    """Gives jobs their share of this machine.

    Args:
        jobs: most jobs at once; None for as many as fit the cores, or the GPUs with one process each.
        threads: threads of each process. They change how sums are rounded, so they do not depend on ``jobs``.
    """

    def __init__(self, jobs: int | None, threads: int) -> None:
        self.jobs = jobs
        self.threads = threads
        self.taken = list[Slot]()

    def take(self, job: Job) -> Slot | None:
        """A share for a job; None while there is no room. A job that is too large runs alone."""
        need, on_gpus = job.processes, job.on_gpus
        loads = Counter(dict.fromkeys(gpu_ids(), 0) if on_gpus else {})
        loads.update(name for slot in self.taken for name in slot.gpus)
        chosen = tuple(sorted(loads, key=loads.__getitem__)[:need]) if on_gpus else ()
        if self.jobs is not None:
            room = len(self.taken) < self.jobs
        elif on_gpus:
            room = not any(loads[name] for name in chosen)
        else:
            processes = need + sum(slot.processes for slot in self.taken if not slot.gpus)
            room = processes * self.threads <= cores() or not self.taken
        if not room:
            return None
        self.taken.append(Slot(need, chosen))
        return self.taken[-1]

    def free(self, slot: Slot) -> None:
        """Releases a share."""
        self.taken.remove(slot)

    def environment(self, slot: Slot) -> dict[str, str]:
        """Environment variables that limit a job to its share."""
        pinned = {"CUDA_VISIBLE_DEVICES": ",".join(slot.gpus)} if slot.gpus else {}
        return {"OMP_NUM_THREADS": str(self.threads)} | pinned


def need_of(config: DictConfig) -> tuple[int, bool]:
    """Processes of a job, and whether each uses a GPU.

    Raises:
        UserError: when this machine does not have the job's hardware.
    """
    hardware = with_devices(config).hardware
    on_gpus = hardware.accelerator == "gpu" or (hardware.accelerator == AUTO and gpus() > 0)
    return int(hardware.devices), on_gpus


def gpu_ids() -> list[str]:
    """The GPUs that this process may use."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(number) for number in range(gpus())]
