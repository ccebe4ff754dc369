"""The interface of rollout engines, and shared functions. ``rollout=`` chooses an engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from policylab.data.rollout import Prompt, Rollout
from policylab.errors import UserError, check_range
from policylab.functional.behaviour import Behaviour
from policylab.functional.masks import length_mask
from policylab.models.policy import Policy


class Engine(Protocol):
    """Samples completions. Any class with these members is an engine.

    One that does not work in any number of processes has a static ``check_processes(number)``, which raises UserError.
    Its optional ``limits`` is a text: the settings that give ``max_new_tokens``, for messages about prompts that do not
    fit; without it, messages name ``rollout.max_new_tokens``. For plans it may state its memory
    (`policylab.rollouts.memory`).
    """

    @property
    def temperature(self) -> float:
        """Divides the logits, in sampling and in training."""
        ...

    @property
    def max_new_tokens(self) -> int:
        """Length limit of completions."""
        ...

    @property
    def exact(self) -> bool:
        """Whether recorded log-probs equal, up to rounding, those of a full forward pass in training precision. If not,
        they are recomputed before training."""
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

        ``values`` of the rollout are None if the engine does not have the critic's input.

        Args:
            noise: uniform numbers, one row per completion and ``max_new_tokens`` columns.
            behaviour: distribution to sample from; None: the policy itself.

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
    """Builds a rollout from an engine's records. Tokens after a row's end are dropped."""
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


def check_processes(engine: Any, processes: int) -> None:
    """Lets the class of an engine refuse the number of processes.

    Raises:
        UserError: saying what to take instead.
    """
    if check := getattr(engine, "check_processes", None):
        check(processes)


def check_settings(temperature: float, max_new_tokens: int) -> None:
    """Refuses settings that no engine supports.

    Raises:
        UserError: when the temperature is not above 0, or ``max_new_tokens`` is below 1.
    """
    if not 0 < temperature < float("inf"):
        raise UserError(f"rollout.temperature is {temperature}; it must be above 0")
    check_range("rollout.max_new_tokens", max_new_tokens, 1)


def pad_left(
    sequences: Sequence[Sequence[int]], device: torch.device | str
) -> tuple[Int[Tensor, "B P"], Int[Tensor, " B"]]:
    """Token ids left-padded with 0, and the number of real ones in each row."""
    width = max(len(s) for s in sequences)
    tokens = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences], device=device)
    return tokens, torch.tensor([len(s) for s in sequences], device=device)


def context(policy: Policy) -> tuple[float, str]:
    """Most positions of a sequence, infinity without a limit; and whether the model or its critic sets it."""
    critics = None if policy.critic is None else policy.critic.context
    limits = [(policy.reader.context, "the model"), (critics, "the critic")]
    known = ((limit, reader) for limit, reader in limits if limit is not None)
    return min(known, default=(math.inf, "the model"))


def check_context(policy: Policy, needed: int) -> None:
    """Refuses sequences that do not fit the context.

    Raises:
        UserError: when the model or its critic has less than ``needed`` positions.
    """
    check_positions(needed, *context(policy))


def check_positions(needed: int, limit: float | None, reader: str) -> None:
    """Raises UserError if ``reader`` has less than ``needed`` positions; None: no limit."""
    if limit is not None and needed > limit:
        raise UserError(
            f"prompt and completion need {needed} positions, but {reader} has {limit}; "
            "lower rollout.max_new_tokens or shorten the prompts"
        )
