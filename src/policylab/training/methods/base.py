"""What a family of methods answers for, so that nothing outside it asks what kind of algorithm it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar

from omegaconf import DictConfig

from policylab.data.plan import BatchPlan
from policylab.training.module import TrainingModule
from policylab.training.parts import Parts

A = TypeVar("A")


@dataclass(frozen=True)
class CriticNeed:
    """A value head, on as many layers of its own.

    Args:
        own_layers: 0 reads the policy's trunk; a number copies the policy's last layers; ``all`` a whole network.
        init: folder of a reward model that it starts as; None starts from the policy.
    """

    own_layers: int | Literal["all"]
    init: str | None = None


@dataclass(frozen=True)
class Needs:
    """What a run must have for a method.

    Args:
        learns_from: ``rollouts``, which training samples and a reward scores, or the ``completions`` of the data.
        critic: that is built beside the policy; None without one.
        reference: second copy of what trains; ``moving`` follows the policy and is saved with it.
        target: third copy, critic included, which follows the policy and is saved with it.
        whole_distributions: updates hold the probabilities of all words, not a few figures a token.
    """

    learns_from: Literal["rollouts", "completions"] = "rollouts"
    critic: CriticNeed | None = None
    reference: Literal["none", "frozen", "moving"] = "none"
    target: bool = False
    whole_distributions: bool = False


@dataclass(frozen=True)
class Cost:
    """What an iteration computes and holds for a while, beside sampling and the networks of `Needs`.

    Args:
        forwards: forward passes over the rollout between sampling and the updates, without gradient.
        passes: forward and backward passes over each sequence of the rollout, in all updates together; a forward pass
            alone counts a third.
        compares: updates hold two distributions over the vocabulary beside each other (exact KL).
        vectors: copies of the trained weights, in fp32, that an update holds (trust region).
        optimizes_policy: the optimizer moves the policy; else the critic alone.
    """

    forwards: float = 0.0
    passes: float = 1.0
    compares: bool = False
    vectors: int = 0
    optimizes_policy: bool = True


class Method(ABC, Generic[A]):
    """A family of methods: everything that a run is built from and planned by that depends on the kind of algorithm.

    A family states what differs from the defaults here, which are those of one update on each rollout without
    reference and critic. `policylab.training.methods.register` enters it for the type of its algorithm.
    """

    def __init__(self, algorithm: A) -> None:
        self.algorithm = algorithm

    def plan(self, rollout: DictConfig, processes: int) -> BatchPlan:
        """How the sequences of an iteration are cut into updates.

        Args:
            rollout: ``config.rollout``.
            processes: of the whole run.

        Raises:
            UserError: when something does not divide.
        """
        return BatchPlan(rollout.prompts, rollout.group_size, 1, 1, processes)

    def needs(self) -> Needs:
        """What must be there."""
        return Needs()

    def check(self, config: DictConfig) -> None:
        """Refuses hardware, adapters and budgets that the method cannot do with, before a model loads.

        Raises:
            UserError: with the reason and what to take instead.
        """

    def check_lengths(self, plan: BatchPlan, longest: int) -> None:
        """Refuses settings that the data's lengths do not allow.

        Args:
            longest: tokens of the longest sequence, prompt and completion.

        Raises:
            UserError: with the arithmetic.
        """

    def cost(self, plan: BatchPlan, *, exact: bool) -> Cost:
        """What an iteration costs.

        Args:
            exact: log-probs recorded while sampling are those of the policy in training.
        """
        return Cost(passes=plan.epochs)

    @abstractmethod
    def trainer(self, parts: Parts) -> TrainingModule:
        """The LightningModule that trains."""
