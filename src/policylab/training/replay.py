"""The replay memory of a run, and the minibatches drawn from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from policylab.algorithms.q_learning import Replay
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Rollout
from policylab.rollouts.noise import REPLAY, uniforms
from policylab.rollouts.replay import Memory
from policylab.training.sampler import Sampler


class ReplayMemory:
    """Finished sequences of all processes; each process holds them all. First in, first out, bounded in tokens.

    Attributes:
        memory: the sequences.
        updates: optimizer steps so far.
    """

    def __init__(self, settings: Replay, plan: BatchPlan, sampler: Sampler) -> None:
        self.settings = settings
        self.plan = plan
        self.seed = sampler.seed
        self.runtime = sampler.runtime
        self.recorder = sampler.recorder
        self.progress = sampler.progress
        self.memory = Memory.empty()
        self.updates = 0

    def add(self, rollout: Rollout) -> None:
        """Adds the sequences of all processes."""
        new = self.runtime.gather(Memory.of(rollout, self.progress.iteration))
        self.memory = self.memory.join(new).newest(self.settings.capacity)

    def minibatches(self) -> Iterator[Rollout]:
        """This process's share of the sequences of each update; no updates while there are too few sequences."""
        if len(self.memory) < self.settings.warmup:
            return
        iteration, size = self.progress.iteration, self.plan.minibatch
        share, memory = size // self.plan.processes, self.memory
        for row in uniforms(self.seed, REPLAY, iteration, range(self.settings.updates), size):
            drawn = memory.draw(row).split(share)[self.runtime.rank]
            age = iteration - memory.iterations[drawn]
            self.recorder.add("train/replay_age", age.to(self.runtime.device))
            yield memory.rollout(drawn).to(self.runtime.device)

    def state(self) -> dict[str, Any]:
        return {"replay": self.memory.state(), "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        saved = Memory(**{name: value.cpu() for name, value in state["replay"].items()})
        self.memory = saved.newest(self.settings.capacity)
        self.updates = state["updates"]
