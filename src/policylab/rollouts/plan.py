"""Batch arithmetic, in one place: prompts x group = sequences; / minibatch = updates; / micro-batch = passes."""

from __future__ import annotations

from dataclasses import dataclass

from policylab.errors import UserError


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of one iteration are cut into optimizer steps and forward passes.

    Args:
        prompts: distinct prompts an iteration, over all processes.
        group_size: completions sampled for each prompt.
        epochs: passes over the rollout.
        minibatch_size: sequences an optimizer step, over all processes; None takes all of them.
        micro_batch_size: sequences a forward pass and process; None takes the whole minibatch.
        processes: data-parallel processes.

    Raises:
        UserError: when a number is not positive or does not divide the one before it.
    """

    prompts: int
    group_size: int
    epochs: int
    minibatch_size: int | None
    micro_batch_size: int | None
    processes: int

    def __post_init__(self) -> None:
        for name in ("prompts", "group_size", "epochs", "minibatch_size", "micro_batch_size", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.prompts % self.processes:
            raise UserError(
                f"rollout.prompts={self.prompts} cannot be shared by {self.processes} processes; "
                f"take a multiple of {self.processes}"
            )
        if self.sequences % self.minibatch:
            raise UserError(
                f"{self.prompts} prompts x {self.group_size} = {self.sequences} sequences cannot be cut into "
                f"minibatches of {self.minibatch}; take a divisor of {self.sequences} for algo.update.minibatch_size"
            )
        if self.minibatch % self.processes:
            raise UserError(
                f"algo.update.minibatch_size={self.minibatch} cannot be shared by {self.processes} processes; "
                f"take a multiple of {self.processes}"
            )

    @property
    def sequences(self) -> int:
        """Sequences an iteration, over all processes."""
        return self.prompts * self.group_size

    @property
    def minibatch(self) -> int:
        """Sequences an optimizer step, over all processes."""
        return self.minibatch_size or self.sequences

    @property
    def micro_batch(self) -> int:
        """Sequences a forward pass and process (the last one of a minibatch may be smaller)."""
        per_process = self.minibatch // self.processes
        return min(self.micro_batch_size or per_process, per_process)

    @property
    def updates(self) -> int:
        """Optimizer steps an iteration."""
        return self.epochs * (self.sequences // self.minibatch)

    def table(self) -> list[tuple[str, str]]:
        """Rows (what, how it comes about) for people."""
        passes = -(-(self.minibatch // self.processes) // self.micro_batch)
        return [
            ("sequences", f"{self.prompts} prompts x {self.group_size} completions = {self.sequences}"),
            ("minibatches", f"{self.sequences} / {self.minibatch} = {self.sequences // self.minibatch}"),
            ("updates", f"{self.sequences // self.minibatch} minibatches x {self.epochs} epochs = {self.updates}"),
            ("passes an update", f"{self.minibatch} / {self.processes} processes in {passes} of {self.micro_batch}"),
        ]
