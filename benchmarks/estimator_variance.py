"""Bias and variance of every estimator, by exact enumeration: prints the table of docs/estimators.md.

    python benchmarks/estimator_variance.py

No sampling, so the numbers are the same on every machine up to rounding.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from enumeration import World, algorithm, gradients, true_gradient
from policylab.algorithms import (
    GAE,
    Algorithm,
    BestOfGroup,
    GreedyBaseline,
    GroupBaseline,
    LeaveOneOut,
    NStep,
    ReturnToGo,
    SequenceMean,
    TokenMean,
)

GROUP = 4  # completions of the prompt in a batch
WORLDS = range(8)  # seeds of the random worlds whose median is shown
OFFSET = 2.0  # added to every reward in the last column


def as_is(world: World) -> World:
    """A random critic: the world's random values."""
    return world


def perfect(world: World) -> World:
    """A perfect critic: the expected reward of every prefix."""
    return world.replace(values=world.true_values())


#: (row of the table, algorithm, change of the world's random critic)
ESTIMATORS: list[tuple[str, Algorithm, Callable[[World], World]]] = [
    ("return to go, no baseline", algorithm(ReturnToGo(1.0, "none", False)), as_is),
    ("batch mean", algorithm(ReturnToGo(1.0, "mean", False)), as_is),
    ("greedy baseline (ReMax)", algorithm(GreedyBaseline()), as_is),
    ("leave one out (RLOO)", algorithm(LeaveOneOut()), as_is),
    ("group mean (Dr. GRPO)", algorithm(GroupBaseline(normalize=False)), as_is),
    ("group mean over std (GRPO's advantage)", algorithm(GroupBaseline(normalize=True)), as_is),
    ("best of the group (RAFT)", algorithm(BestOfGroup()), as_is),
    ("return to go, whitened (REINFORCE++)", algorithm(ReturnToGo(1.0, "none", True)), as_is),
    ("perfect critic, lambda 1 (n-step, V-trace)", algorithm(GAE(1.0, 1.0, False)), perfect),
    ("perfect critic, lambda 0.95", algorithm(GAE(1.0, 0.95, False)), perfect),
    ("perfect critic, n = 2", algorithm(NStep(1.0, 2, False)), perfect),
    ("perfect critic, lambda 0 (n = 1)", algorithm(GAE(1.0, 0.0, False)), perfect),
    ("perfect critic, lambda 0.95, whitened (PPO)", algorithm(GAE(1.0, 0.95, True)), perfect),
    ("random critic, lambda 1 (n-step, V-trace)", algorithm(GAE(1.0, 1.0, False)), as_is),
    ("random critic, lambda 0.95", algorithm(GAE(1.0, 0.95, False)), as_is),
    ("random critic, n = 2", algorithm(NStep(1.0, 2, False)), as_is),
    ("random critic, lambda 0 (n = 1)", algorithm(GAE(1.0, 0.0, False)), as_is),
    ("leave one out, sequence mean", algorithm(LeaveOneOut(), reduction=SequenceMean()), as_is),
    ("leave one out, token mean", algorithm(LeaveOneOut(), reduction=TokenMean()), as_is),
]


def measure(algo: Algorithm, world: World) -> tuple[float, float, float, float]:
    """Bias and length of the expected gradient relative to the true one, its cosine with it, and the noise.

    Noise is the trace of the covariance times the sequences of the batch, over the squared length of the expected
    gradient: the number of sequences whose mean gradient is as long as its error.
    """
    weights, directions = gradients(algo, world, GROUP)
    truth = true_gradient(world)
    mean = torch.einsum("n,nsv->sv", weights, directions)
    variance = (weights * (directions - mean).square().sum((1, 2))).sum() * GROUP
    cosine = (mean * truth).sum() / (mean.norm() * truth.norm())
    bias, length = (mean - truth).norm() / truth.norm(), mean.norm() / truth.norm()
    return float(bias), float(length), float(cosine), float(variance / mean.square().sum())


def table() -> str:
    """The Markdown table: medians over the worlds."""
    lines = [
        f"| estimator | bias | length | cosine | noise | noise, rewards + {OFFSET:g} |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    worlds = [World.random(seed) for seed in WORLDS]
    yardstick = [measure(algorithm(LeaveOneOut()), world)[-1] for world in worlds]
    for name, algo, critic in ESTIMATORS:
        plain = [measure(algo, critic(world)) for world in worlds]
        shifted = [measure(algo, critic(w.replace(rewards=w.rewards + OFFSET))) for w in worlds]
        bias, length, cosine = (statistics.median(row[k] for row in plain) for k in range(3))
        noise, offset_noise = (
            statistics.median(row[-1] / of_one for row, of_one in zip(rows, yardstick, strict=True))
            for rows in (plain, shifted)
        )
        shown = f"{abs(bias):.2f} | {length:.2f} | {cosine:.2f} | {noise:.2f} | {offset_noise:.2f}"
        lines.append(f"| {name} | {shown} |")
    return "\n".join(lines)


def main() -> None:
    print(table())


if __name__ == "__main__":
    main()
