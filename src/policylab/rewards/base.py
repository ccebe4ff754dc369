"""What a reward is, and the one place where its answers are checked.

A reward is a function from completions to numbers, one each; whatever it needs beside the text (ground
truth, a graph, a unit test) lies in ``completion.reference``, put there by the task.
See ``docs/tasks_and_rewards.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from policylab.errors import UserError
from policylab.rollouts.text import Completion


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


def score(reward: Reward, completions: Sequence[Completion]) -> Scores:
    """Calls the reward and checks what it says.

    Raises:
        UserError: when it gives another number of scores than completions, something that is no finite
            number, or other parts for one completion than for the first.
    """
    name = reward_name(reward)
    return checked(name, answers_of(name, reward(completions), len(completions)), completions)


def checked(name: str, answers: Sequence[Score], completions: Sequence[Completion]) -> Scores:
    """The scores that a reward of this name gave, one for each completion.

    Raises:
        UserError: when one is no finite number, or has other parts than the first.
    """
    parts = list(answers[0].parts) if answers else []
    for index, answer in enumerate(answers):
        if answer.parts.keys() != set(parts):
            raise UserError(
                f"reward {name} gave the parts {sorted(answer.parts)} for completion {index}, but "
                f"{sorted(parts)} for completion 0; give every completion the same parts"
            )
    return Scores(
        total=_numbers(name, "score", [answer.total for answer in answers], completions),
        parts={
            part: _numbers(name, f"part {part!r}", [answer.parts[part] for answer in answers], completions)
            for part in parts
        },
    )


def answers_of(name: str, given: Any, expected: int) -> list[Score]:
    """One ``Score`` a completion, whatever sequence the reward returned.

    Raises:
        UserError: when it returned another number of them.
    """
    try:
        answers = list(given)
    except TypeError:
        raise UserError(
            f"reward {name} returned {given!r:.60}; "
            f"it must return one score for each of the {expected} completions"
        ) from None
    if len(answers) != expected:
        raise UserError(
            f"reward {name} returned {len(answers)} scores for {expected} completions; "
            f"return one for each, in their order"
        )
    return [answer if isinstance(answer, Score) else Score(answer, {}) for answer in answers]


def _numbers(name: str, what: str, values: list[Any], completions: Sequence[Completion]) -> list[float]:
    numbers = [_number(value) for value in values]
    for index, number in enumerate(numbers):
        if not math.isfinite(number):
            raise UserError(
                f"reward {name} gave {values[index]!r:.60} as the {what} of completion {index} "
                f"({completions[index].text!r:.60}); it must be a finite number"
            )
    return numbers


def _number(value: Any) -> float:
    """A number of any library as a float; not a number for everything else."""
    if isinstance(value, str):
        return math.nan  # float() would take "0.5", but a reward that answers in text is a mistake
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
