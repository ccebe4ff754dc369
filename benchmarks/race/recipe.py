"""Shared by both sides of `benchmarks/to_reward.py`: the recipe as plain data, the reward, the held-out evaluation.

TRL's side imports this in its own environment, which needs torch and vaderSentiment.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

FILE = "recipe.json"
#: Held-out prompts that are sampled at once, and the seed of their sampling, the same at every evaluation.
HELD_OUT_BATCH, HELD_OUT_SEED = 128, 0


@dataclass(frozen=True)
class Recipe:
    """A preset's values, and its prompts for training and evaluation."""

    algo: str  #: grpo, rloo
    seed: int
    model: str  #: folder in Hugging Face format
    iterations: int  #: at most
    prompts: int  #: an iteration
    group_size: int
    new_tokens: int
    temperature: float
    epochs: int
    minibatches: int
    learning_rate: float
    betas: tuple[float, float]
    eps: float
    max_grad_norm: float
    kl_coef: float
    clip: float | None  #: None where the surrogate has no ratio
    constant: float | None  #: that divides the loss of a sequence; None where it is a mean over tokens
    trl_micro_batch: int  #: sequences that TRL's update takes at once
    train: list[str]  #: prompts of all iterations, in order
    held_out: list[str]

    @property
    def sequences(self) -> int:
        """Completions an iteration."""
        return self.prompts * self.group_size

    @property
    def updates(self) -> int:
        """Optimizer steps an iteration."""
        return self.epochs * self.minibatches

    def write(self, folder: Path) -> None:
        (folder / FILE).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Self:
        return cls(**json.loads((folder / FILE).read_text()))


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


def reward(text: str) -> float:
    """VADER's compound score, as in ``reward=sentiment``."""
    return float(_analyzer().polarity_scores(text)["compound"])


@torch.no_grad()
def held_out_reward(generate: Callable[..., Any], tokenizer: Any, recipe: Recipe) -> float:
    """Mean reward of one completion for each held-out prompt. Equal weights give equal figures on both sides.

    Args:
        generate: the model's own method.
    """
    return sum(map(reward, completions(generate, tokenizer, recipe))) / len(recipe.held_out)


def completions(generate: Callable[..., Any], tokenizer: Any, recipe: Recipe) -> list[str]:
    """One sampled text for each held-out prompt."""
    texts: list[str] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(HELD_OUT_SEED)
        for start in range(0, len(recipe.held_out), HELD_OUT_BATCH):
            tokens, mask = padded(tokenizer(recipe.held_out[start : start + HELD_OUT_BATCH])["input_ids"])
            eos = tokenizer.eos_token_id
            out = generate(
                input_ids=tokens, attention_mask=mask, do_sample=True, top_k=0, temperature=recipe.temperature,
                max_new_tokens=recipe.new_tokens, eos_token_id=eos, pad_token_id=eos,
            )  # fmt: skip
            texts += tokenizer.batch_decode(out[:, tokens.shape[1] :], skip_special_tokens=True)
    return texts


def padded(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids padded on the left, and their mask."""
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return tokens, mask
