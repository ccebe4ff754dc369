"""Prompts and completions as rewards, metrics and people see them. No tensors: processes that score need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """One prompt, as the policy reads it and as a person does.

    Example: ``Prompt(id=3, text="the plot is", tokens=(0, 271, 88, 64), reference=None, target=())``
    """

    id: int  #: row in its data set
    text: str
    tokens: tuple[int, ...]  #: what the policy reads (special tokens and chat template included), never empty
    reference: Any  #: ground truth for rewards and metrics; plain data
    target: tuple[int, ...]  #: supervised completion with its EOS; empty where there is none


@dataclass(frozen=True)
class Completion:
    """A finished sample, as rewards and metrics get it."""

    prompt: str
    text: str  #: decoded completion without special tokens
    reference: Any
    tokens: tuple[int, ...]  #: the sampled ids, EOS included when there is one
    ended: bool  #: False when it was cut at the length limit


@dataclass(frozen=True)
class Sample:
    """One line of ``samples.jsonl``."""

    iteration: int
    split: str  #: "train" or "val"
    prompt: str
    completion: str
    reward: float
    parts: dict[str, float]
    kl: float | None  #: nats a sequence to the reference; None without one
    length: int  #: tokens that the policy chose
    ended: bool
    tokens: tuple[int, ...]  #: the completion's ids as they were sampled, EOS included when there is one
