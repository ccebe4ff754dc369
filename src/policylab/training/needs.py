"""The requirements of a method and the cost of an iteration: stated by its family, read by trainers and plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CriticNeed:
    """A critic: value head plus this many own layers.

    Args:
        own_layers: 0: reads the policy's trunk; a number: copies that many of the policy's last layers; ``all``: a
            whole network.
        init: folder of a reward model to start from; None: starts from the policy.
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
        whole_distributions: updates hold the probabilities of the whole vocabulary, not only a few numbers per token.
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
        passes: forward and backward passes over each sequence of the rollout, in all updates together; a forward pass
            without a backward pass counts a third.
        compares: updates hold two distributions over the vocabulary at once (exact KL).
        vectors: fp32 copies of the trainable weights that an update holds (trust region).
        optimizes_policy: whether the optimizer moves the policy; otherwise it moves only the critic.
    """

    forwards: float = 0.0
    passes: float = 1.0
    compares: bool = False
    vectors: int = 0
    optimizes_policy: bool = True
