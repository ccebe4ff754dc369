"""The interface of a family of methods. Code outside a family never checks the type of its algorithm."""

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
    """A critic: value head plus this many own layers.

    Args:
        own_layers: 0 reads the policy's trunk; a number copies that many of the policy's last layers; ``all`` is a
            whole network.
        init: folder of a reward model to start from; None starts from the policy.
    """

    own_layers: int | Literal["all"]
    init: str | None = None


@dataclass(frozen=True)
class Needs:
    """The networks and data the method requires.

    Args:
        learns_from: ``rollouts``, which training samples and a reward scores, or the ``completions`` of the data.
        critic: the critic to build; None without one.
        reference: a second copy of the trainable weights; ``moving`` follows the policy and is saved with it.
        target: whether there is a target network: a copy of policy and critic that follows them and is saved.
        whole_distributions: updates hold the probabilities of all words, not only a few numbers per token.
    """

    learns_from: Literal["rollouts", "completions"] = "rollouts"
    critic: CriticNeed | None = None
    reference: Literal["none", "frozen", "moving"] = "none"
    target: bool = False
    whole_distributions: bool = False


@dataclass(frozen=True)
class Cost:
    """Compute and temporary memory of an iteration, without sampling and networks.

    Args:
        forwards: forward passes over the rollout between sampling and the updates, without gradient.
        passes: forward and backward passes over each sequence of the rollout, in all updates together; a lone forward
            pass counts a third.
        compares: updates hold two distributions over the vocabulary at once (exact KL).
        vectors: fp32 copies of the trainable weights that an update holds (trust region).
        optimizes_policy: whether the optimizer moves the policy; otherwise it moves only the critic.
    """

    forwards: float = 0.0
    passes: float = 1.0
    compares: bool = False
    vectors: int = 0
    optimizes_policy: bool = True


class Method(ABC, Generic[A]):
    """A family of methods: everything in building and planning a run that depends on the kind of algorithm.

    The defaults are one update on each rollout, without reference and critic; a family overrides what differs.
    `policylab.training.methods.register` registers it for the type of its algorithm.
    """

    def __init__(self, algorithm: A) -> None:
        self.algorithm = algorithm

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

    def cost(self, plan: BatchPlan, *, exact: bool) -> Cost:
        """Compute and temporary memory of an iteration.

        Args:
            exact: whether log-probs recorded while sampling equal those in training.
        """
        return Cost(passes=plan.epochs)

    @abstractmethod
    def trainer(self, parts: Parts) -> TrainingModule:
        """The LightningModule that trains."""
