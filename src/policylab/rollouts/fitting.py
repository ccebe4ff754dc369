"""Rows of a data set that are too long for the model: ``task.too_long`` says how they are treated."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.models.policy import Policy
from policylab.rollouts.engine import context
from policylab.user_code import shown

log = logging.getLogger(__name__)

TOO_LONG = ("drop", "truncate", "refuse")


class Placed(Protocol):
    """A row that may know its place in a file."""

    @property
    def where(self) -> str: ...


def fitting(
    policy: Policy,
    prompts: Sequence[Prompt],
    rows: Sequence[Placed],
    *,
    new_tokens: int,
    instruction: str | None,
    split: str,
    too_long: str,
) -> list[Prompt]:
    """The prompts that fit the model, each with ``new_tokens`` or its own completion; a warning says how many do not.

    Args:
        rows: the task's rows that the prompts were made of.
        instruction: the template that the prompts were made with.
        split: name of the rows in messages.
        too_long: ``drop`` leaves prompts out, so that the ids of the others stay; ``truncate`` cuts a prompt at its
            beginning and a completion at its end (which then has no EOS); ``refuse`` raises.

    Raises:
        UserError: naming the first row that does not fit, when it is to be refused or cannot be cut; and when none is
            left.
    """
    if too_long not in TOO_LONG:
        raise UserError(f"task.too_long={too_long} is not one of {', '.join(TOO_LONG)}")
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
        lower = f"lower rollout.max_new_tokens={new_tokens}, or " if helps else ""
        raise UserError(
            f"{what}; {lower}take ++task.too_long=drop (they are left out) or "
            "++task.too_long=truncate (the beginning of a prompt and the end of a completion are cut)"
        )
    gone = {prompt.id for prompt in over}
    if too_long == "drop":
        left = [prompt for prompt in prompts if prompt.id not in gone]
        if not left:
            raise UserError(f"{what}; task.too_long=drop leaves nothing")
        log.warning("%s; they are left out (task.too_long=drop)", what)
        return left
    log.warning("%s; they are cut (task.too_long=truncate)", what)
    room = int(limit)
    return [
        truncated(policy, prompt, room, new_tokens, instruction) if prompt.id in gone else prompt
        for prompt in prompts
    ]


def needed(prompt: Prompt, new_tokens: int) -> int:
    """Positions that the longest sequence with this prompt takes."""
    return len(prompt.tokens) + max(new_tokens, len(prompt.target))


def truncated(policy: Policy, prompt: Prompt, room: int, new_tokens: int, instruction: str | None) -> Prompt:
    """The prompt with the beginning of its text cut so that ``new_tokens`` fit, and its completion cut to what is left.

    Raises:
        UserError: when the instruction and template alone take all the room.
    """
    words = policy.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]
    shorter, kept = prompt, len(words)
    while (excess := len(shorter.tokens) + new_tokens - room) > 0:
        kept -= excess  # once more where a shorter text has more tokens than it had as a part
        if kept < 1:
            raise UserError(
                f"task.too_long=truncate: {shown(prompt.text)} leaves nothing of its text beside the instruction and "
                f"rollout.max_new_tokens={new_tokens} in {room} positions; shorten task.instruction"
            )
        text = policy.decode(words[-kept:])
        (shorter,) = policy.prompts([(text, "", prompt.reference)], instruction)
    return replace(shorter, id=prompt.id, target=prompt.target[: room - len(shorter.tokens)])
