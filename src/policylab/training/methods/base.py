"""The interface of a family of methods. Code outside a family never checks the type of its algorithm."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from omegaconf import DictConfig

from policylab.contracts import check_overrides
from policylab.data.plan import BatchPlan
from policylab.training.module import TrainingModule
from policylab.training.needs import Cost, Needs
from policylab.training.parts import Parts

A = TypeVar("A")


class Method(ABC, Generic[A]):
    """A family of methods: everything in building and planning a run that depends on the kind of algorithm.

    The defaults are one update on each rollout, without reference and critic; a family overrides what differs.
    `policylab.training.methods.register` registers it for the type of its algorithm.
    """

    def __init__(self, algorithm: A) -> None:
        self.algorithm = algorithm

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        check_overrides(cls, Method)

    def plan(self, rollout: DictConfig, processes: int) -> BatchPlan:
        """How the sequences of an iteration are split into updates.

        Args:
            rollout: ``config.rollout``.
            processes: number of processes.

        Raises:
            UserError: when something does not divide.
        """
        return BatchPlan(rollout.prompts, rollout.group_size, 1, 1, processes)

    def needs(self) -> Needs:
        """The networks and data the method requires."""
        return Needs()

    def check(self, config: DictConfig) -> None:
        """Refuses hardware, adapters and budgets that the method does not support, before a model loads.

        Raises:
            UserError: with the reason and an alternative.
        """

    def check_lengths(self, plan: BatchPlan, longest: int) -> None:
        """Refuses settings that the data's lengths do not allow.

        Args:
            longest: tokens of the longest sequence, prompt and completion.

        Raises:
            UserError: with the arithmetic.
        """

    def check_episodes(self) -> None:
        """Refuses a method that does not support a task with an environment.

        Raises:
            UserError: with the reason and an alternative.
        """

    def cost(self, plan: BatchPlan, *, exact: bool) -> Cost:
        """Compute and temporary memory of an iteration.

        Args:
            exact: whether log-probs recorded while sampling equal those in training.
        """
        return Cost(passes=plan.epochs)

    @abstractmethod
    def trainer(self, parts: Parts) -> TrainingModule:
        """The LightningModule that trains."""
