"""Handles rows of a data set that are too long for the model, as set by ``task.too_long``."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.models.policy import Policy
from policylab.rollouts.engine import context
from policylab.user_code import shown

log = logging.getLogger(__name__)

TOO_LONG = ("drop", "truncate", "refuse")


def fitting(
    policy: Policy,
    prompts: Sequence[Prompt],
    rows: Sequence[Any],
    *,
    new_tokens: int,
    instruction: str | None,
    split: str,
    too_long: str,
    limits: str | None = None,
) -> list[Prompt]:
    """The prompts that fit the model together with ``new_tokens`` or their completion. Warns how many do not fit.

    Args:
        rows: the task's rows, from which the prompts were made; ``where`` is their position in a file, if known.
        instruction: the template of the prompts.
        split: name of the rows in messages.
        too_long: ``drop`` removes prompts, and the others keep their ids; ``truncate`` cuts the beginning of a prompt
            and the end of a completion (which then has no EOS); ``refuse`` raises.
        limits: the settings that ``new_tokens`` comes from, for messages; None: ``rollout.max_new_tokens``.

    Raises:
        UserError: naming the first row that does not fit, if it is refused or cannot be cut; and if no row is left.
    """
    if too_long not in TOO_LONG:
        raise UserError(f"task.too_long={too_long} is not one of {', '.join(TOO_LONG)}")
    limits = limits or f"rollout.max_new_tokens={new_tokens}"
    limit, reader = context(policy)
    over = [prompt for prompt in prompts if needed(prompt, new_tokens) > limit]
    if not over:
        return list(prompts)
    worst = max(over, key=lambda prompt: needed(prompt, new_tokens))
    named = rows[worst.id].where or f"row {worst.id}"
    what = (
        f"{len(over)} of {len(prompts)} rows of {split} do not fit the {limit} positions of {reader}: the longest, "
        f"{named} ({shown(worst.text)}), needs {needed(worst, new_tokens)}, of which {len(worst.tokens)} for its prompt"
    )
    if too_long == "refuse" or new_tokens >= limit:
        helps = new_tokens >= limit or needed(worst, 1) <= limit
        lower = f"lower {limits}, or " if helps else ""
        raise UserError(
            f"{what}; {lower}take ++task.too_long=drop (they are left out) or "
            "++task.too_long=truncate (the beginning of a prompt and the end of a completion are cut)"
        )
    gone = {prompt.id for prompt in over}
    if too_long == "drop":
        left = [prompt for prompt in prompts if prompt.id not in gone]
        if not left:
            raise UserError(f"{what}; task.too_long=drop would leave none")
        log.warning("%s; they are left out (task.too_long=drop)", what)
        return left
    log.warning("%s; they are cut (task.too_long=truncate)", what)
    room = int(limit)
    return [
        truncated(policy, prompt, room, new_tokens, instruction, limits) if prompt.id in gone else prompt
        for prompt in prompts
    ]


def needed(prompt: Prompt, new_tokens: int) -> int:
    """Positions of the longest sequence with this prompt."""
    return len(prompt.tokens) + max(new_tokens, len(prompt.target))


def truncated(
    policy: Policy, prompt: Prompt, room: int, new_tokens: int, instruction: str | None, limits: str
) -> Prompt:
    """The prompt, with the beginning of its text cut so that ``new_tokens`` fit, and its completion cut to the rest.

    Raises:
        UserError: when the instruction and the chat template alone do not fit.
    """
    words = policy.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    shorter, kept = prompt, len(words)
    while (excess := len(shorter.tokens) + new_tokens - room) > 0:
        kept -= excess  # repeated, because a part of a text can have more tokens alone than in the whole text
        if kept < 1:
            raise UserError(
                f"task.too_long=truncate: of {shown(prompt.text)} no text is left beside the instruction and "
                f"{limits} in {room} positions; shorten task.instruction"
            )
        text = policy.decode(words[-kept:])
        (shorter,) = policy.prompts([(text, "", prompt.reference)], instruction)
    return replace(shorter, id=prompt.id, target=prompt.target[: room - len(shorter.tokens)])
