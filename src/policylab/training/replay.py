"""The replay memory of a run, and the minibatches drawn from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from policylab.algorithms.q_learning import Replay
from policylab.data.plan import BatchPlan
from policylab.data.rollout import Rollout
from policylab.rollouts.noise import REPLAY, uniforms
from policylab.rollouts.replay import Memory, ReplayBuffer
from policylab.training.sampler import Sampler


class ReplayMemory:
    """Finished sequences of all processes; each process holds them all.

    Attributes:
        updates: optimizer steps so far.
    """

    def __init__(self, settings: Replay, plan: BatchPlan, sampler: Sampler) -> None:
        self.settings = settings
        self.plan = plan
        self.seed = sampler.seed
        self.runtime = sampler.runtime
        self.recorder = sampler.recorder
        self.progress = sampler.progress
        self.buffer = ReplayBuffer(settings.capacity)
        self.updates = 0

    def add(self, rollout: Rollout) -> None:
        """Adds the sequences of all processes."""
        self.buffer.add(self.runtime.gather(Memory.of(rollout, self.progress.iteration)))

    def minibatches(self) -> Iterator[Rollout]:
        """This process's share of the sequences of each update; no updates while there are too few sequences."""
        if len(self.buffer) < self.settings.warmup:
            return
        iteration, size = self.progress.iteration, self.plan.minibatch
        share, memory = size // self.plan.processes, self.buffer.memory
        for row in uniforms(self.seed, REPLAY, iteration, range(self.settings.updates), size):
            drawn = self.buffer.draw(row).split(share)[self.runtime.rank]
            age = iteration - memory.iterations[drawn]
            self.recorder.add("train/replay_age", age.to(self.runtime.device))
            yield memory.rollout(drawn).to(self.runtime.device)

    def state(self) -> dict[str, Any]:
        return {"replay": self.buffer.state_dict(), "updates": self.updates}

    def load(self, state: dict[str, Any]) -> None:
        self.buffer.load_state_dict(state["replay"])
        self.updates = state["updates"]
