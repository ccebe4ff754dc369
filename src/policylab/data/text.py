"""Prompts and completions for rewards, metrics and people. No tensors: processes that score do not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
class Completion:
    """A finished sample, for rewards and metrics."""

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
