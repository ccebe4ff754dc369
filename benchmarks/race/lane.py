"""A worker's connection to the referee: waits for a command, runs one iteration, reports its times.

Commands arrive on standard input and answers go to the original standard output, one JSON object per line. Output of
libraries goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook


class Lane:
    """One worker's connection and stopwatch.

    Attributes:
        command: of the current iteration.
        gradients: the side's gradients before an optimizer step, under names that both sides use.
        loss: sum of the losses of backward passes, in an iteration whose gradients are compared.
        evaluate: computes the side's held-out reward; not timed.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self.command: dict[str, Any] = {}
        self.gradients: Callable[[], Mapping[str, Tensor]] = dict
        self.evaluate: Callable[[], float] = lambda: float("nan")
        self.loss = 0.0
        self._clock: dict[str, float] = {}
        self._started = self._cpu_started = self._step_started = 0.0
        backward = torch.autograd.backward

        def clocked(tensors: Any, *args: Any, **kwargs: Any) -> None:
            if "gradients" in self.command:
                self.loss += float(tensors)
            with self.clock("backward"):
                backward(tensors, *args, **kwargs)

        torch.autograd.backward = clocked  # where Tensor.backward looks for it
        register_optimizer_step_pre_hook(self._before_step)
        register_optimizer_step_post_hook(self._after_step)

    def ready(self, facts: Mapping[str, Any]) -> None:
        """Everything is loaded; waits for the first command."""
        self._answer({**facts, "threads": torch.get_num_threads(), "rest_gib": memory()})
        self._wait()

    def done(self, facts: Mapping[str, Any]) -> None:
        """The iteration is over; waits for the next command."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self._started
        spent = {"seconds": seconds, "cpu_seconds": time.process_time() - self._cpu_started}
        self._answer({**facts, **spent, "clock": self._clock, "loss": self.loss, "gib": memory()})
        self._wait()

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        """Adds the time inside to a phase."""
        start = time.perf_counter()
        yield
        self._clock[phase] = self._clock.get(phase, 0.0) + time.perf_counter() - start

    def loss_begins(self) -> None:
        """Marks the beginning of the update: the time before was sampling and evaluation of the samples."""
        self._clock.setdefault("before_loss", time.perf_counter() - self._started)

    def _wait(self) -> None:
        while True:
            self.command = json.loads(sys.stdin.readline() or '{"do": "stop"}')
            if self.command["do"] == "stop":
                self._answer({"peak_gib": peak_memory()})
                os._exit(0)  # neither trainer has work left
            if self.command["do"] != "evaluate":
                break
            self._answer({"reward": self.evaluate()})
        self._clock = {}
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def _answer(self, facts: Mapping[str, Any]) -> None:
        self._answers.write(json.dumps(facts) + "\n")

    def _before_step(self, *_: Any) -> None:
        if "gradients" in self.command:
            for (
                name,
                gradient,
            ) in self.gradients().items():  # one by one: a copy of all would count as peak memory
                np.save(
                    f"{self.command['gradients']}/{name}.npy", gradient.detach().float().numpy(force=True)
                )
        self._step_started = time.perf_counter()

    def _after_step(self, *_: Any) -> None:
        seconds = time.perf_counter() - self._step_started
        self._clock["optimizer"] = self._clock.get("optimizer", 0.0) + seconds


def memory() -> float | None:
    """GiB of this process, on the GPU if it uses one; None if the system does not report it."""
    if torch.cuda.is_initialized():
        return torch.cuda.memory_allocated() / 2**30
    file = Path("/proc/self/statm")
    return int(file.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30 if file.exists() else None


def peak_memory() -> float:
    """Peak GiB of this process, on the GPU if it uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)
