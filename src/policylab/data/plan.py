"""Batch arithmetic, in one place: prompts x group = sequences; / minibatches = sequences an optimizer step."""

from __future__ import annotations

from dataclasses import dataclass

from policylab.errors import UserError, check_range, counted


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of one iteration are cut into optimizer steps.

    Args:
        prompts: distinct prompts an iteration, over all processes.
        group_size: completions sampled for each prompt.
        epochs: passes over the rollout.
        minibatches: optimizer steps an epoch.
        processes: data-parallel processes.

    Raises:
        UserError: when a number is not positive or does not divide the one before it.
    """

    prompts: int
    group_size: int
    epochs: int
    minibatches: int
    processes: int

    def __post_init__(self) -> None:
        for name in ("prompts", "group_size", "epochs", "minibatches", "processes"):
            check_range(name, getattr(self, name), 1)
        if self.prompts % self.processes:
            raise UserError(
                f"rollout.prompts={self.prompts} cannot be shared by {self.processes} processes; "
                f"take a multiple of {self.processes}"
            )
        if self.sequences % self.minibatches:
            raise UserError(
                f"{counted(self.prompts, 'prompt')} x {self.group_size} = {counted(self.sequences, 'sequence')} cannot "
                f"be cut into {self.minibatches} minibatches; take a divisor of {self.sequences} for "
                "algo.update.minibatches"
            )

    @property
    def sequences(self) -> int:
        """Sequences an iteration, over all processes."""
        return self.prompts * self.group_size

    @property
    def minibatch(self) -> int:
        """Sequences an optimizer step, over all processes."""
        return self.sequences // self.minibatches

    @property
    def updates(self) -> int:
        """Optimizer steps an iteration."""
        return self.epochs * self.minibatches

    def table(self) -> list[tuple[str, str]]:
        """Rows (name, calculation) for the console."""
        return [
            (
                "sequences",
                f"{counted(self.prompts, 'prompt')} x {counted(self.group_size, 'completion')} = {self.sequences}",
            ),
            (
                "minibatches",
                f"{self.sequences} / {self.minibatches} = {counted(self.minibatch, 'sequence')} each",
            ),
            (
                "updates",
                f"{counted(self.minibatches, 'minibatch')} x {counted(self.epochs, 'epoch')} = {self.updates} an "
                "iteration",
            ),
        ]


@dataclass(frozen=True)
class ReplayPlan(BatchPlan):
    """A batch plan whose updates draw from a replay memory instead of the rollout.

    Args:
        replayed: sequences an optimizer step, over all processes.
        replay_updates: optimizer steps an iteration.

    Raises:
        UserError: when processes cannot share the sequences of a step evenly.
    """

    replayed: int
    replay_updates: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.replayed % self.processes:
            raise UserError(
                f"algo.replay.batch_size={self.replayed} cannot be shared by {self.processes} processes; "
                f"take a multiple of {self.processes}"
            )

    @property
    def minibatch(self) -> int:
        return self.replayed

    @property
    def updates(self) -> int:
        return self.replay_updates

    def table(self) -> list[tuple[str, str]]:
        sequences, _, _ = super().table()
        drawn = f"{self.updates} an iteration, each on {counted(self.minibatch, 'sequence')} drawn from the memory"
        return [sequences, ("updates", drawn)]
