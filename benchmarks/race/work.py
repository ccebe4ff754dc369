"""The work of both sides, as plain data. Standard library only: TRL's side imports it in its own environment."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

#: The two ids that are never sampled by chance (`weights.py` renumbers the vocabulary). TRL needs a padding token.
EOS, PAD = 0, 1
PROMPT_TOKENS = 32

LEARNING_RATE = 1e-5
BETAS = (0.9, 0.999)
EPS = 1e-8
CLIP = 0.2
KL_COEF = 0.05  # PPO, RLOO; GRPO runs without a reference
LAMBDA = 0.95
VALUE_COEF = 0.1


@dataclass(frozen=True)
class Work:
    """One race.

    Example: ``Work("tiny", "grpo", "fixed", "fp32", "separate", 16, 4, 64, 64, "cpu")``
    """

    model: str  #: tiny, gpt2, smollm2, llama
    algo: str  #: ppo, grpo, rloo
    lengths: (
        str  #: fixed: all completions are cut at ``new_tokens``; varied: each ends where ``schedule`` says
    )
    precision: str  #: fp32, bf16
    critic: str  #: ours in PPO, separate or shared; TRL's is always separate
    prompts: int
    group_size: int
    new_tokens: int
    trl_micro_batch: int  #: sequences that TRL's update takes at once; a divisor of all
    device: str  #: cpu, cuda

    @property
    def sequences(self) -> int:
        return self.prompts * self.group_size

    @property
    def name(self) -> str:
        critic = f"-{self.critic}" if self.algo == "ppo" else ""
        device = "" if self.device == "cpu" else f"-{self.device}"
        return f"{self.model}-{self.algo}{critic}-{self.lengths}-{self.precision}{device}"

    def schedule(self) -> list[int]:
        """Tokens of each completion, its EOS included. Varied: evenly spread over 1 to ``new_tokens``, shuffled."""
        if self.lengths == "fixed":
            return [self.new_tokens] * self.sequences
        spread = [math.ceil(self.new_tokens * (i + 1) / self.sequences) for i in range(self.sequences)]
        random.Random(0).shuffle(spread)
        return spread

    def prompt_ids(self, vocabulary: int) -> list[list[int]]:
        """Distinct prompts, of ids drawn evenly from a vocabulary of this size."""
        draw = random.Random(1)
        return [
            [draw.randrange(PAD + 1, vocabulary) for _ in range(PROMPT_TOKENS)] for _ in range(self.prompts)
        ]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        return cls(**json.loads(text))


def as_text(ids: Iterable[int]) -> str:
    """The text that the stand-in tokenizer reads as exactly these ids."""
    return " ".join(map(str, ids))


def reward(ids: Sequence[int]) -> float:
    """A pseudo-random sum over the tokens, with mean 0 and variance 1 for any length."""
    tokens = [i for i in ids if i not in (EOS, PAD)]
    pseudo_random = (((i * 2654435761) % 2**32) / 2**32 - 0.5 for i in tokens)
    return sum(pseudo_random) * math.sqrt(12 / max(len(tokens), 1))


def digest(rows: Iterable[Sequence[int]]) -> str:
    """A fingerprint of rows of ids that does not depend on their order."""
    return hashlib.sha256(json.dumps(sorted(map(list, rows))).encode()).hexdigest()[:16]


def vocabulary_of(model: Path) -> int:
    """Rows of the embedding of a saved model."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return int(config["vocab_size"])
