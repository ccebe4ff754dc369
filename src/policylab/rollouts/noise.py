"""Sampling noise as data: a uniform number for each (seed, stream, iteration, sample, position).

So a rollout depends only on weights, prompts and seed. It is the same on one process or eight, with any batch size,
and after a resume.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

#: Independent streams of one seed. Do not change the numbers: older runs could not be reproduced.
TRAIN, VALIDATION, PREFLIGHT, GENERATE, SHUFFLE, REFILL, REPLAY = range(7)


def seed_libraries(*key: int) -> None:
    """Seeds the generators of Python, numpy and torch.

    PolicyLab does not use them, but a user's reward may; it then draws the same numbers after a resume.
    """
    number = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def seed_of(noise: Float[Tensor, " T"]) -> int:
    """A seed for other random numbers of a sample, from its noise; hashed, so that it is independent of the tokens."""
    return int(np.random.SeedSequence(int(float(noise[0]) * 2**53)).generate_state(1)[0])


def uniforms(
    seed: int, stream: int, iteration: int, samples: Sequence[int], width: int
) -> Float[Tensor, "B T"]:
    """Uniform numbers in [0, 1), float64, on the CPU.

    Row ``i`` depends only on (seed, stream, iteration, samples[i]), and its first ``t`` numbers do not
    depend on ``width``. The generator is counter-based (Philox: "Parallel random numbers: as easy as 1, 2, 3",
    Salmon et al., SC 2011), so it has no state between calls.

    Args:
        samples: index of each row's sample within the whole iteration, over all processes.
    """
    key = np.array([seed, iteration], dtype=np.uint64)
    rows = [
        np.random.Generator(
            np.random.Philox(key=key, counter=np.array([0, 0, sample, stream], dtype=np.uint64))
        ).random(width)
        for sample in samples
    ]
    return torch.from_numpy(np.stack(rows))
