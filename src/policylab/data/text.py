"""Prompts, completions and an environment's turns as text, for rewards, metrics and samples.

Without tensors, so that processes that score need not import torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Prompt:
    """One prompt, as tokens and as text.

    Example: ``Prompt(id=3, text="the plot is", tokens=(0, 271, 88, 64), reference=None, target=())``
    """

    id: int  #: row in its data set
    text: str
    tokens: tuple[int, ...]  #: the policy's input, with special tokens and chat template; never empty
    reference: Any  #: ground truth for rewards and metrics; plain data
    target: tuple[int, ...]  #: supervised completion with its EOS; empty if there is none


@dataclass(frozen=True)
class Turn:
    """An environment's answer to a turn of the policy.

    Example: ``Turn("higher", reward=-0.1, done=False)``
    """

    text: str  #: the policy reads it next; after the last turn it is only shown in samples
    reward: float  #: given to the last token of the policy's turn
    done: bool  #: whether the episode has ended
    truncated: bool = False  #: whether it is cut here
    parts: Mapping[str, float] = field(default_factory=dict)  #: logged, summed over the turns


class Environment(Protocol):
    """Answers the policy, with Gymnasium's ``reset`` and ``step`` for text. Each episode has its own object."""

    def reset(self, prompt: Prompt, seed: int) -> str:
        """The first observation, which the policy reads after the prompt; "" for none.

        Args:
            seed: for all random numbers of this episode.
        """
        ...

    def step(self, text: str) -> Turn:
        """The answer to a turn of the policy."""
        ...


@dataclass(frozen=True)
class Episode:
    """The text of an episode after the prompt."""

    observation: str  #: the environment's first text
    turns: tuple[tuple[str, Turn], ...]  #: the policy's text and the answer of each turn


@dataclass(frozen=True)
class Completion:
    """A finished sample, for rewards and metrics: the policy's text, without that of an environment."""

    prompt: str  #: with an environment's first observation
    text: str  #: decoded completion without special tokens; turns are joined by line breaks
    reference: Any
    tokens: tuple[int, ...]  #: the sampled ids, EOS included when there is one
    ended: bool  #: False when it was cut at the length limit, or its episode was cut
    turns: tuple[tuple[str, Turn], ...] = ()  #: the policy's text and the environment's answer of each turn

    @property
    def transcript(self) -> str:
        """The text to show, with the environment's answers in brackets."""
        if not self.turns:
            return self.text
        return " ".join(f"{written.strip()} [{turn.text.strip()}]" for written, turn in self.turns)


@dataclass(frozen=True)
class Sample:
    """One line of ``samples.jsonl``."""

    iteration: int
    split: str  #: "train" or "val"
    prompt: str
    completion: str  #: with an environment's answers
    reward: float
    parts: dict[str, float]
    kl: float | None  #: nats a sequence to the reference; None without one
    length: int  #: tokens that the policy chose
    ended: bool
    tokens: tuple[int, ...]  #: the ids that the policy chose, EOS included when there is one
