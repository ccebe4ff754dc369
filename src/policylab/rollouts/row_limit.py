"""Rollouts in pieces: no more completions are sampled at once than fit in memory.

A completion depends only on the weights, its prompt and its own noise, so the pieces do not change any token.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from policylab.contracts import returned
from policylab.data.rollout import Prompt, Rollout
from policylab.distributed.allocator import main_memory
from policylab.distributed.world import world
from policylab.errors import UserError, counted
from policylab.functional.behaviour import Behaviour
from policylab.models.memory import rows_at_once
from policylab.models.policy import Policy
from policylab.rollouts.engine import Engine

#: Limit for engines that schedule their own rows.
EVERY_ROW = sys.maxsize


class RowLimit:
    """The number of completions sampled at once.

    Args:
        rows: the limit, at least 1; None: as many as should fit in memory.

    Attributes:
        asked: the configured limit.
        rows: the configured limit, or the smaller one found after out-of-memory.
    """

    def __init__(self, rows: int | None) -> None:
        self.asked = self.rows = rows

    def sample(
        self,
        engine: Engine,
        policy: Policy,
        prompts: Sequence[Prompt],
        group_size: int,
        noise: Float[Tensor, "B T"],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """As ``engine.sample``, in pieces of whole groups or, if a group does not fit, of some completions of a prompt.

        When memory runs out, the piece is sampled again in halves, and the smaller limit is kept.

        Raises:
            UserError: when a single completion does not fit.
        """
        limit = self.rows or rows_that_fit(policy, prompts, engine.max_new_tokens)
        pieces: list[Rollout] = []
        first = 0
        while first < len(noise):
            some, completions = piece(prompts, group_size, first, limit)
            rows = len(some) * completions
            try:
                sampled = engine.sample(policy, some, completions, noise[first : first + rows], behaviour)
                pieces.append(whole(engine, sampled, rows))
                first += rows
                continue
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if rows == 1:
                    raise UserError(
                        f"out of memory while one completion of at most {counted(engine.max_new_tokens, 'token')} is "
                        "sampled; take a smaller model, or lower rollout.max_new_tokens"
                    ) from error
            # outside the handler, because the error keeps the failed attempt's tensors alive
            if policy.device.type == "cuda":
                torch.cuda.empty_cache()
            self.rows = limit = rows // 2
            warnings.warn(
                f"out of memory: from now on at most {counted(limit, 'completion')} at once; "
                f"rollout.max_rows={limit} starts with that",
                stacklevel=2,
            )
        if len(pieces) == 1:
            return pieces[0]
        rollout = Rollout.concatenate(pieces)
        groups = torch.arange(len(prompts), device=rollout.tokens.device)
        return rollout.replace(group_ids=groups.repeat_interleave(group_size))


def whole(engine: Engine, rollout: Rollout, rows: int) -> Rollout:
    """The rollout that an engine returned.

    Raises:
        UserError: when it is none, or has another number of completions.
    """
    owner = f"{type(engine).__name__}.sample"
    if len(returned(owner, rollout, Rollout)) != rows:
        raise UserError(f"{owner} returned {counted(len(rollout), 'completion')}, and {rows} were asked for")
    return rollout


def piece(prompts: Sequence[Prompt], group_size: int, first: int, limit: int) -> tuple[Sequence[Prompt], int]:
    """The next piece, from row ``first`` on: some prompts, and the number of completions of each.

    >>> piece("abc", 4, 0, 9), piece("abc", 4, 8, 9), piece("abc", 4, 0, 3), piece("abc", 4, 3, 3)
    (('ab', 4), ('c', 4), ('a', 3), ('a', 1))
    """
    prompt, done = divmod(first, group_size)
    if done == 0 and limit >= group_size:
        return prompts[prompt : prompt + limit // group_size], group_size
    return prompts[prompt : prompt + 1], min(limit, group_size - done)


def rows_that_fit(policy: Policy, prompts: Sequence[Prompt], max_new_tokens: int) -> int:
    """Number of completions of these prompts that should fit in memory. Depends only on model, prompts and machine, not
    on what else is in memory, so that a resumed run has the same pieces."""
    device = policy.device
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = main_memory() // world().local_size
    return rows_at_once(
        policy.reader.shape(),
        context=max(len(prompt.tokens) for prompt in prompts) + max_new_tokens,
        number=policy.dtype.itemsize,
        memory=memory,
    )


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a GPU or main memory has run out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
