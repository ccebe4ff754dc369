"""Splits a rollout into minibatches, and minibatches into micro-batches, one forward pass each.

Rows that belong together, such as the two sides of a preference pair or the group of a prompt, form a unit, which is
never split. Each row has the number of its unit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence, Set
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.functional.ragged import on_device
from policylab.models.memory import tokens_a_pass
from policylab.models.policy import Policy

#: Limit on attention scores held at once (elements; 128 MiB of fp32). Attention pads short sequences to the length of
#: the longest one in the micro-batch.
SCORES = 2**25


def cut(
    rollout: Rollout,
    rows: Int[Tensor, " N"],
    tokens: int,
    *,
    packs: bool,
    units: Int[Tensor, " B"] | None = None,
) -> list[Int[Tensor, " M"]]:
    """The rows in micro-batches of at most ``tokens`` tokens; a larger unit is a micro-batch by itself.

    Args:
        rows: indices into the rollout; each is in exactly one micro-batch.
        packs: whether a prompt is read once for all its completions and nothing is padded. If so, completions of one
            prompt are kept together; otherwise sequences of similar length are.
        units: number of each row's unit; None: each row is its own.
    """
    columns = [rows, rollout.prompt_ids[rows], rollout.prompt_lengths[rows], rollout.lengths[rows]]
    table = torch.stack(columns if units is None else [*columns, units[rows]]).T.tolist()
    whole: dict[int, list[_Sequence]] = {}
    for place, (row, prompt, prompt_length, length, *unit) in enumerate(table):
        whole.setdefault(unit[0] if unit else place, []).append(_Sequence(prompt, length, prompt_length, row))
    together = sorted(whole.values(), key=_place if packs else _longest)
    batches: list[list[int]] = []
    seen: set[int] = set()
    filled = widest = longest = 0
    for unit in together:
        if batches:
            count = len(batches[-1]) + len(unit)
            widest, longest = max(widest, _widest(unit)), max(longest, _longest(unit))
            cost = filled + _packed(unit, seen) if packs else longest * count
        if not batches or cost > tokens or count * widest * longest > SCORES:
            batches.append([])
            seen, widest, longest = set(), _widest(unit), _longest(unit)
            cost = _packed(unit, seen) if packs else longest * len(unit)
        batches[-1] += [sequence.row for sequence in unit]
        seen.update(sequence.prompt for sequence in unit)
        filled = cost
    return on_device([torch.tensor(batch) for batch in batches], rows.device)


class _Sequence(NamedTuple):
    prompt: int
    length: int
    prompt_length: int
    row: int


def _place(unit: Sequence[_Sequence]) -> tuple[int, int]:
    """Sort key: prompt, then length."""
    return min((sequence.prompt, sequence.length) for sequence in unit)


def _widest(unit: Sequence[_Sequence]) -> int:
    """Tokens of the longest completion."""
    return max(sequence.length for sequence in unit)


def _longest(unit: Sequence[_Sequence]) -> int:
    """Tokens of the longest sequence."""
    return max(sequence.prompt_length + sequence.length for sequence in unit)


def _packed(unit: Sequence[_Sequence], seen: Set[int]) -> int:
    """Tokens of the completions, and of the prompts that are not yet in ``seen``."""
    prompts = {sequence.prompt: sequence.prompt_length for sequence in unit if sequence.prompt not in seen}
    return sum(sequence.length for sequence in unit) + sum(prompts.values())


def split(
    noise: Float[Tensor, " S"], size: int, units: Int[Tensor, " S"] | None = None
) -> list[Int[Tensor, " M"]]:
    """Sequences sorted by their noise, in minibatches of ``size``. On the CPU.

    A unit is placed where its first row would be, and belongs to the minibatch in which it begins. So with units of
    unequal size, a minibatch may hold more or fewer sequences, even none.

    Args:
        noise: one number per sequence of all processes, so that all processes find the same minibatches.
        units: number of each sequence's unit; None: each sequence is its own.
    """
    count = len(noise)
    places = torch.arange(count)
    numbers, unit = (places if units is None else units).unique(return_inverse=True)
    first = torch.full_like(places, count).scatter_reduce_(0, unit, places, "amin")[: len(numbers)]
    rank = noise[first].argsort(stable=True).argsort()[unit]
    sizes = rank.bincount()
    order = rank.argsort(stable=True)
    minibatch = ((sizes.cumsum(0) - sizes) // size)[rank[order]]
    return [order[minibatch == i] for i in range(math.ceil(count / size))]


def tokens_that_fit(policy: Policy, *, whole_distributions: bool) -> int:
    """Tokens of a forward and backward pass that should fit in memory. Depends only on model and machine, not on what
    else is in memory, so that a resumed run has the same micro-batches.

    Args:
        whole_distributions: whether a pass holds the probabilities of the whole vocabulary, not only a few numbers per
            token.
    """
    device = policy.device
    cuda = device.type == "cuda"
    memory = torch.cuda.get_device_properties(device).total_memory if cuda else None
    return tokens_a_pass(
        policy.reader.shape(),
        whole_distributions=whole_distributions,
        recomputes_layers=policy.recomputes_layers,
        gpu_bytes=memory,
    )
