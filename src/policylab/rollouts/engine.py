"""What a rollout engine is, and what all of them need. ``rollout=`` chooses one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policylab.data.rollout import Prompt, Rollout
from policylab.errors import UserError
from policylab.functional.masks import length_mask
from policylab.models.policy import Policy
from policylab.rollouts.behaviour import Behaviour


class Engine(Protocol):
    """Samples completions. Any class with these members will do."""

    @property
    def temperature(self) -> float:
        """Divides the logits. Training divides by the same number."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Completions are cut here."""
        ...

    @property
    def exact(self) -> bool:
        """Whether the recorded log-probs are, up to rounding, those of a full forward pass in the precision of
        training. Those of another engine are computed again before they are trained on."""
        ...

    def sample(
        self,
        policy: Policy,
        prompts: Sequence[Prompt],
        group_size: int,
        noise: Float[Tensor, "B T"],
        behaviour: Behaviour | None = None,
    ) -> Rollout:
        """``group_size`` completions of each prompt, those of one prompt in adjacent rows.

        ``values`` of the rollout are None where the engine does not see what the critic reads.

        Args:
            noise: uniform numbers, a row for each completion and ``max_new_tokens`` columns.
            behaviour: what is sampled from; None is the policy itself.

        Raises:
            UserError: when prompt and completion do not fit the model's context.
        """
        ...


def assemble(
    prompts: Sequence[Prompt],
    group_size: int,
    tokens: Int[Tensor, "B T"],
    lengths: Int[Tensor, " B"],
    ended: Bool[Tensor, " B"],
    logprobs: Float[Tensor, "B T"],
) -> Rollout:
    """The rollout of an engine, from what it records. Tokens after a row's end are dropped."""
    width, device = int(lengths.max()), tokens.device
    mask = length_mask(lengths, width)
    prompt_tokens, prompt_lengths = pad_left([prompt.tokens for prompt in prompts], device)
    groups = torch.arange(len(prompts), device=device).repeat_interleave(group_size)
    return Rollout(
        prompt_tokens=prompt_tokens[groups],
        prompt_lengths=prompt_lengths[groups],
        tokens=tokens[:, :width].masked_fill(~mask, 0),
        lengths=lengths,
        action_mask=mask,
        ended=ended,
        group_ids=groups,
        prompt_ids=torch.tensor([prompt.id for prompt in prompts], device=device)[groups],
        logprobs=logprobs[:, :width].masked_fill(~mask, 0.0),
    )


def check_settings(temperature: float, max_new_tokens: int) -> None:
    """Refuses what no engine can do.

    Raises:
        UserError: when the temperature is not above 0, or there is nothing to sample.
    """
    if not 0 < temperature < float("inf"):
        raise UserError(f"rollout.temperature is {temperature}; it must be above 0")
    if max_new_tokens < 1:
        raise UserError(f"rollout.max_new_tokens is {max_new_tokens}; it must be at least 1")


def pad_left(
    sequences: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Int[Tensor, "B P"], Int[Tensor, " B"]]:
    """Token ids with padding in front, and how many are real. The padding id is 0."""
    width = max(len(s) for s in sequences)
    tokens = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences], device=device)
    return tokens, torch.tensor([len(s) for s in sequences], device=device)


def context(policy: Policy) -> tuple[float, str]:
    """Positions that a sequence may take, and whether the model or its critic sets that limit; infinity without one."""
    critics = None if policy.critic is None else policy.critic.context
    limits = [(policy.reader.context, "the model"), (critics, "the critic")]
    known = ((limit, reader) for limit, reader in limits if limit is not None)
    return min(known, default=(math.inf, "the model"))


def check_context(policy: Policy, needed: int) -> None:
    """Refuses sequences that do not fit.

    Raises:
        UserError: when ``needed`` positions are more than the model or its critic has.
    """
    check_positions(needed, *context(policy))


def check_positions(needed: int, limit: float | None, reader: str) -> None:
    """Raises UserError when ``needed`` positions are more than ``reader`` has; None is no limit."""
    if limit is not None and needed > limit:
        raise UserError(
            f"prompt and completion need {needed} positions, but {reader} has {limit}; "
            "lower rollout.max_new_tokens or shorten the prompts"
        )
