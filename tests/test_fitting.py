"""task.too_long: rows that are too long for the model are left out, cut or refused, and their number is printed."""

from __future__ import annotations

from typing import Any

import pytest

from policylab.data.rollout import Prompt
from policylab.errors import UserError
from policylab.models.policy import Policy
from policylab.rollouts.fitting import fitting, needed
from policylab.tasks.base import Example

NEW, ROOM = 24, 64  # tokens to sample, positions of the tiny model
LONG = "it was a dark and stormy night " * 12
ROWS = [
    Example("the film is", "", None, "a.jsonl:1"),
    Example(LONG + "the film is", " good", None, "a.jsonl:2"),
    Example("short", " and so on" * 60, None, "a.jsonl:3"),
    Example("the end", " good", None),
]


def fitted(policy: Policy, rows: list[Example], too_long: str, **changes: Any) -> list[Prompt]:
    instruction = changes.pop("instruction", None)
    prompts = policy.prompts([(row.text, row.completion, row.reference) for row in rows], instruction)
    how = {"new_tokens": NEW, "instruction": instruction, "split": "train", "too_long": too_long} | changes
    return fitting(policy, prompts, rows, **how)


def test_a_row_is_named_where_it_is_refused(tiny_policy):
    message = (
        r"2 of 4 rows of train do not fit the 64 positions of the model: the longest, a\.jsonl:\d \('.*'\), "
    )
    with pytest.raises(
        UserError,
        match=message + r"needs \d+, of which \d+ for its prompt; take \+\+task\.too_long=drop",
    ):
        fitted(tiny_policy, ROWS, "refuse")
    with pytest.raises(UserError, match=r"; lower rollout\.max_new_tokens=63, or take"):
        fitted(tiny_policy, [ROWS[0]], "refuse", new_tokens=ROOM - 1)
    assert len(fitted(tiny_policy, [ROWS[0], ROWS[3]], "refuse")) == 2


def test_dropped_rows_are_counted_and_other_rows_keep_their_noise(tiny_policy, caplog):
    assert [prompt.id for prompt in fitted(tiny_policy, ROWS, "drop")] == [0, 3]
    assert caplog.messages[0].startswith("2 of 4 rows of train do not fit")
    assert caplog.messages[0].endswith("they are left out (task.too_long=drop)")
    with pytest.raises(UserError, match=r"task\.too_long=drop would leave none"):
        fitted(tiny_policy, ROWS[1:3], "drop")


def test_a_cut_prompt_keeps_its_end_and_a_cut_completion_its_beginning(tiny_policy, caplog):
    whole = tiny_policy.prompts([(row.text, row.completion, None) for row in ROWS], None)
    prompts = fitted(tiny_policy, ROWS, "truncate")
    assert caplog.messages[0].endswith("they are cut (task.too_long=truncate)")
    assert prompts[0] == whole[0]
    assert prompts[3] == whole[3]
    assert ROWS[1].text.endswith(prompts[1].text)
    assert prompts[1].text.endswith("the film is")
    assert len(prompts[1].tokens) + NEW <= ROOM
    assert len(prompts[1].tokens) + NEW > ROOM - 8, "no more than must go"
    assert prompts[1].target == whole[1].target
    assert prompts[2].tokens == whole[2].tokens
    assert prompts[2].target == whole[2].target[: ROOM - len(whole[2].tokens)]
    assert all(needed(prompt, NEW) <= ROOM for prompt in prompts)


def test_what_leaves_no_room_is_refused_in_any_case(tiny_policy):
    with pytest.raises(
        UserError, match=r"4 of 4 rows of train do not fit .*lower rollout\.max_new_tokens=64"
    ):
        fitted(tiny_policy, ROWS, "truncate", new_tokens=ROOM)
    with pytest.raises(UserError, match=r"task\.too_long=cut is not one of drop, truncate, refuse"):
        fitted(tiny_policy, ROWS, "cut")


def test_the_rest_of_an_instruction_is_not_cut(tiny_policy):
    """Only the text is shortened; other braces of the instruction stay."""
    chat = replace_chat(tiny_policy)
    ask = 'answer as {"json": true}: {text}'
    (short,) = fitted(chat, [ROWS[0]], "refuse", instruction=ask)
    assert 'answer as {"json": true}: the film is' in chat.tokenizer.decode(short.tokens)
    (long,) = fitted(chat, [ROWS[1]], "truncate", instruction=ask)
    assert chat.tokenizer.decode(long.tokens).startswith(chat.tokenizer.decode(short.tokens)[:20])
    assert len(long.tokens) + NEW <= ROOM
    with pytest.raises(UserError, match="no text is left beside the instruction"):
        fitted(chat, [ROWS[1]], "truncate", instruction="why " * 60 + "{text}")


def replace_chat(policy: Policy) -> Policy:
    """The policy as a chat model with the plainest of templates."""
    from copy import deepcopy

    policy.tokenizer = deepcopy(policy.tokenizer)
    policy.tokenizer.chat_template = "{{ messages[0].content }}"
    policy.chat = True
    return policy
