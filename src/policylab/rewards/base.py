"""What a reward is, and the one place where its answers are checked.

A reward is a function from completions to numbers, one each; whatever it needs beside the text (ground
truth, a graph, a unit test) lies in ``completion.reference``, put there by the task.
See ``docs/tasks_and_rewards.md``.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from policylab.data.text import Completion
from policylab.errors import UserError
from policylab.user_code import call, shown

#: The largest number of single precision, in which rewards are kept.
LARGEST = 3.4028234663852886e38
WHAT_A_REWARD_IS = (
    "a reward is a function of one argument, the completions (each with .prompt, .text, .reference, .tokens and "
    ".ended), that returns a number for each; whatever else it takes is given by keys of `reward` (+reward.words=3)"
)


@dataclass(frozen=True)
class Score:
    """A reward with its breakdown.

    Example: ``Score(total=0.62, parts={"positive": 0.4, "negative": 0.0})``
    """

    total: float  #: what is maximised
    parts: dict[str, float]  #: what is logged beside it; need not add up to the total


@dataclass(frozen=True)
class Scores:
    """The checked scores of a batch, in the order of its completions."""

    total: list[float]
    parts: dict[str, list[float]]  #: one list a part, each as long as ``total``


Reward = Callable[[Sequence[Completion]], Sequence[float | Score]]


def reward_name(reward: Reward) -> str:
    """What messages call a reward: its function's or its class's name."""
    reward = getattr(reward, "func", reward)  # Hydra hands functions over as functools.partial
    return getattr(reward, "__name__", type(reward).__name__)


def demand_reward(reward: Any) -> None:
    """Refuses what cannot be called with completions alone.

    Raises:
        UserError: saying what a reward is.
    """
    name = reward_name(reward)
    if isinstance(reward, functools.partial) and inspect.isclass(reward.func):
        raise UserError(
            f"reward {name} is a class: give reward._partial_=false, and it is built from the keys of `reward` and "
            "then called with completions"
        )
    if not callable(reward):
        raise UserError(f"reward: {shown(reward)} cannot be called; {WHAT_A_REWARD_IS}")
    try:
        signature = inspect.signature(reward)
    except ValueError:  # of a function that is not written in Python
        return
    try:
        signature.bind(())
    except TypeError as error:
        raise UserError(
            f"reward {name}{signature} cannot be called with completions alone ({error}): {WHAT_A_REWARD_IS}"
        ) from None


def score(reward: Reward, completions: Sequence[Completion]) -> Scores:
    """Calls the reward and checks what it says.

    Raises:
        UserError: when it gives another number of scores than completions, something that is no finite
            number, or other parts for one completion than for the first.
        RunError: when it raises anything.
    """
    return checked(reward_name(reward), ask(reward, completions), completions)


def ask(reward: Reward, completions: Sequence[Completion]) -> list[Score]:
    """The reward's answers, one for each completion, their numbers not yet checked.

    Raises:
        UserError: when it returns no sequence, or one of another length.
        RunError: when it raises anything.
    """
    owner, given = f"reward {reward_name(reward)}", handed_over(completions)
    answers = one_for_each(owner, call(owner, reward, given, among=given), len(given))
    return [answer if isinstance(answer, Score) else Score(answer, {}) for answer in answers]


def handed_over(completions: Sequence[Completion]) -> tuple[Completion, ...]:
    """Completions for the user's code, which may sort the sequence or change what a reference holds: neither is ours.

    A reference that completions share is copied once.

    Raises:
        RunError: when a reference cannot be copied.
    """
    references = call(
        "copying the references (they must be plain data)",
        copy.deepcopy,
        [completion.reference for completion in completions],
    )
    pairs = zip(completions, references, strict=True)
    return tuple(replace(completion, reference=reference) for completion, reference in pairs)


def checked(name: str, answers: Sequence[Score], completions: Sequence[Completion]) -> Scores:
    """The scores that a reward of this name gave, one for each completion.

    Raises:
        UserError: when one is no finite number, or has other parts than the first.
    """
    owner = f"reward {name}"
    for index, answer in enumerate(answers):
        if not is_named(answer.parts):
            raise UserError(
                f"{owner} gave {shown(answer.parts)} as the parts of completion {index}; they must be a dict from "
                "names (printable, on one line) to numbers"
            )
        if answer.parts.keys() != answers[0].parts.keys():
            raise UserError(
                f"{owner} gave the parts {sorted(answer.parts)} for completion {index}, but "
                f"{sorted(answers[0].parts)} for completion 0; give every completion the same parts"
            )
    parts = list(answers[0].parts) if answers else []
    return Scores(
        total=finite(owner, "score", [answer.total for answer in answers], completions),
        parts={
            part: finite(owner, f"part {part!r}", [answer.parts[part] for answer in answers], completions)
            for part in parts
        },
    )


def is_named(values: Any) -> bool:
    """Whether it is a dict whose keys can be names of metrics."""
    return isinstance(values, Mapping) and all(
        isinstance(name, str) and name.isprintable() for name in values
    )


def one_for_each(owner: str, given: Any, expected: int) -> list[Any]:
    """What the user's code returned, as a list.

    Args:
        owner: how messages call it.
        expected: completions.

    Raises:
        UserError: when it is no sequence in an order that means something, or of another length.
        RunError: when going through it raises anything.
    """
    dimensions = getattr(given, "ndim", None)  # of an array of any library
    ordered = isinstance(given, Sequence) and not isinstance(given, str | bytes | bytearray)
    if dimensions != 1 and (dimensions is not None or not ordered):
        what = f"an array of shape {tuple(given.shape)}" if dimensions is not None else shown(given)
        raise UserError(
            f"{owner} returned {what}; it must return a list of {expected} scores, one for each completion"
        )
    # an array gives all its numbers at once, be they on another device
    answers = call(owner, given.tolist if hasattr(given, "tolist") else functools.partial(list, given))
    if len(answers) != expected:
        raise UserError(
            f"{owner} returned {len(answers)} scores for {expected} completions; "
            f"return one for each, in their order"
        )
    return answers


def finite(owner: str, what: str, values: Sequence[Any], completions: Sequence[Completion]) -> list[float]:
    """The values as floats.

    Args:
        owner, what: how messages call who gave them, and them.

    Raises:
        UserError: naming the completion whose value is no finite number.
    """
    numbers = [_number(value) for value in values]
    for index, number in enumerate(numbers):
        if not abs(number) <= LARGEST:
            raise UserError(
                f"{owner} gave {shown(values[index])} as the {what} of completion {index} "
                f"({shown(completions[index].text)}); it must be a finite number (of single precision)"
            )
    return numbers


def _number(value: Any) -> float:
    """A number of any library as a float; not a number for everything else."""
    # float() would take "0.5" and an array of one number, but a reward that answers so is a mistake
    if isinstance(value, str | bytes | bytearray) or getattr(value, "ndim", None):
        return math.nan
    try:
        return float(value)
    except Exception:  # whatever an object's __float__ raises; OverflowError for 10**400
        return math.nan
