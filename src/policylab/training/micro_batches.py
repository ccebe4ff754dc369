"""How the sequences of a minibatch are cut into forward passes: by tokens, since these are what memory pays for."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from policylab.data.rollout import Rollout
from policylab.functional.ragged import on_device
from policylab.models.memory import tokens_a_pass
from policylab.models.policy import Policy

#: Scores of a layer's attention that are masked at a time, in elements (128 MiB of fp32): short sequences beside a long
#: one would otherwise be padded to its length there.
SCORES = 2**25


def cut(rollout: Rollout, rows: Int[Tensor, " N"], tokens: int, *, packs: bool) -> list[Int[Tensor, " M"]]:
    """The rows in micro-batches of at most ``tokens`` tokens (a longer sequence has one to itself).

    Args:
        rows: indices into the rollout; each comes back once.
        packs: whether a prompt is read once for all its completions, so that these had better stay together, and
            nothing is padded. Otherwise sequences of like length stay together.
    """
    table = torch.stack([rows, rollout.prompt_ids[rows], rollout.prompt_lengths[rows], rollout.lengths[rows]])
    sequences = table.T.tolist()
    sequences.sort(key=(lambda s: (s[1], s[3])) if packs else (lambda s: s[2] + s[3]))
    batches: list[list[int]] = []
    seen: set[int] = set()
    filled = widest = longest = 0
    for row, prompt, prompt_length, length in sequences:
        widest, longest = max(widest, length), max(longest, prompt_length + length)
        count = len(batches[-1]) + 1 if batches else 1
        cost = filled + length + (0 if prompt in seen else prompt_length) if packs else longest * count
        if not batches or cost > tokens or count * widest * longest > SCORES:
            batches.append([])
            seen, widest, longest = set(), length, prompt_length + length
            cost = longest
        batches[-1].append(row)
        seen.add(prompt)
        filled = cost
    return on_device([torch.tensor(batch) for batch in batches], rows.device)


def tokens_that_fit(policy: Policy, *, whole_distributions: bool) -> int:
    """Tokens a forward and backward pass that should fit in memory. Depends on model and machine alone, not on what
    else is in memory, so that a resumed run is cut as before.

    Args:
        whole_distributions: whether the probabilities of all words are held, not a few figures a token.
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
