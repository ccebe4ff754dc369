"""The interface of rewards, and the check of their scores.

A reward is an object with ``score(batch)``, or a plain function from completions to numbers. Other data that it needs
(ground truth, a graph, a unit test) are in ``completion.reference``, set by the task.
See ``docs/tasks_and_rewards.md``.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from policylab.contracts import check_state
from policylab.data.text import Completion
from policylab.errors import UserError
from policylab.user_code import (
    as_number,
    call,
    check_names,
    finite,
    handed_over,
    is_finite,
    one_for_each,
    shown,
)

if TYPE_CHECKING:
    from torch import Tensor

WHAT_A_REWARD_IS = (
    "a reward is a function of one argument, the completions (each with .prompt, .text, .reference, .tokens and "
    ".ended), that returns a number for each; its other arguments are keys of `reward` (+reward.words=3)"
)


@dataclass(frozen=True)
class Score:
    """A score with its parts, which a function may return for a completion instead of a number.

    Example: ``Score(total=0.62, parts={"positive": 0.4, "negative": 0.0})``
    """

    total: float  #: the number to maximize
    parts: dict[str, float]  #: only logged, as ``train/reward/<name>``; need not add up to the total
    turns: Sequence[float] = ()  #: the part of the total for each turn; the last turn gets the rest


@dataclass(frozen=True)
class Scores:
    """The scores of a batch, in the order of its completions; lists, or arrays and tensors of one dimension.

    Example: ``Scores(total=[0.62, 0.1], parts={"positive": [0.4, 0.1]})``
    """

    total: Sequence[float]
    parts: Mapping[str, Sequence[float]] = field(default_factory=dict)  #: as in `Score`, a list for each name
    turns: Sequence[Sequence[float]] = ()  #: as in `Score`, a list for each completion; may be empty


@dataclass(frozen=True)
class ScoringBatch:
    """Completions to score. They are copies, so a reward may change their references."""

    completions: tuple[Completion, ...]
    device: str = "cpu"  #: device of the reward's networks, such as "cuda:0"

    def tokens(self) -> tuple[Tensor, Tensor]:
        """The completions' ids on the device, ``[B, T]``, padded on the right with 0; and a mask of the real ones."""
        import torch  # not at the top: processes that score text start without it

        lengths = torch.tensor([len(completion.tokens) for completion in self.completions], dtype=torch.long)
        mask = torch.arange(int(lengths.max()) if len(lengths) else 0) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long)
        real = [token for completion in self.completions for token in completion.tokens]
        ids[mask] = torch.tensor(real, dtype=torch.long)
        return ids.to(self.device), mask.to(self.device)


class Reward(Protocol):
    """Scores completions. Its ``state_dict()`` and ``load_state_dict(state)``, if it has them, serve checkpoints."""

    def score(self, batch: ScoringBatch) -> Scores:
        """One number for each completion, and as many in each part."""
        ...


#: The short form of a reward.
RewardFunction = Callable[[Sequence[Completion]], Sequence[float | Score]]


def takes_batch(reward: Any) -> bool:
    """Whether the reward is called by its method ``score``: it has one, and no ``__call__`` of its own.

    In a class with ``__call__``, ``score`` may be a helper. The ``__call__`` of `torch.nn.Module` does not count, and a
    layer named ``score``, as in classifiers, is not a method.
    """
    kind = type(reward)
    calls = next((base for base in kind.__mro__ if "__call__" in vars(base)), None)
    return hasattr(kind, "score") and (calls is None or calls.__module__.startswith("torch."))


def reward_name(reward: Reward | RewardFunction) -> str:
    """The name of a reward in messages: that of its function or class."""
    reward = getattr(reward, "func", reward)  # Hydra passes functions as functools.partial
    return getattr(reward, "__name__", type(reward).__name__)


def check_reward(reward: Any) -> None:
    """Refuses an object that has no ``score`` and cannot be called with completions alone, or would lose its state.

    Raises:
        UserError: explaining what a reward is, or naming the missing method.
    """
    name = reward_name(reward)
    if isinstance(reward, functools.partial) and inspect.isclass(reward.func):
        raise UserError(
            f"reward {name} is a class: give reward._partial_=false, and it is built from the keys of `reward` and "
            "then scores completions"
        )
    function = reward.score if takes_batch(reward) else reward
    if not callable(function):
        raise UserError(f"reward: {shown(reward)} cannot be called; {WHAT_A_REWARD_IS}")
    check_state(f"reward {name}", reward)
    try:
        signature = inspect.signature(function)
    except ValueError:  # of a function that is not written in Python
        return
    try:
        signature.bind(())
    except TypeError as error:
        raise UserError(
            f"reward {name}{signature} cannot be called with completions alone ({error}): {WHAT_A_REWARD_IS}"
        ) from None


def score(reward: Reward | RewardFunction, completions: Sequence[Completion], device: str = "cpu") -> Scores:
    """The reward's checked scores.

    Raises:
        UserError: when it gives another number of scores than completions, a score that is not a finite number, or
            other parts for one completion than for the first.
        RunError: when it raises anything.
    """
    return checked(reward_name(reward), [ask(reward, ScoringBatch(tuple(completions), device))], completions)


def ask(reward: Any, batch: ScoringBatch) -> Scores:
    """The reward's scores, as many as completions, their values not yet checked.

    Raises:
        UserError: when it returns something else, or another number of scores.
        RunError: when it raises anything.
    """
    owner, count = f"reward {reward_name(reward)}", len(batch.completions)
    given = handed_over(batch.completions)
    with without_gradients():
        if takes_batch(reward):
            scores = call(owner, reward.score, ScoringBatch(given, batch.device), among=given)
            if not isinstance(scores, Scores):
                raise UserError(
                    f"{owner} returned {shown(scores)}; score(batch) must return Scores(total, parts)"
                )
        else:
            scores = in_columns(owner, one_for_each(owner, call(owner, reward, given, among=given), count))
    check_names(owner, "its parts", scores.parts, nested=True)
    return Scores(
        one_for_each(owner, scores.total, count),
        {
            name: one_for_each(f"{owner}: part {name!r}", values, count)
            for name, values in scores.parts.items()
        },
        of_turns(owner, scores.turns, batch.completions),
    )


def of_turns(owner: str, given: Any, completions: Sequence[Completion]) -> Sequence[Sequence[float]]:
    """The rewards of each completion's turns, zero if none were given; empty if no completion has turns.

    Raises:
        UserError: when a list is missing, a completion has another number of turns, or a value is not finite.
    """
    listed = as_list(owner, given)
    if listed is None:
        raise UserError(f"{owner} gave {shown(given)} as turns; give a list of numbers for each completion")
    rows = one_for_each(f"{owner}: turns", listed, len(completions)) if listed else [()] * len(completions)
    turns = list[list[float]]()
    for index, (row, completion) in enumerate(zip(rows, completions, strict=True)):
        values = as_list(owner, row)
        if values == []:
            values = [0.0] * len(completion.turns)
        if values is None or len(values) != len(completion.turns) or not all(map(is_finite, values)):
            raise UserError(
                f"{owner} gave {shown(row)} to the turns of completion {index}, which has {len(completion.turns)}; "
                "give a finite number for each"
            )
        turns.append(list(map(as_number, values)))
    return turns if any(turns) else ()


def as_list(owner: str, given: Any) -> list[Any] | None:
    """A sequence, or an array of any library, as a list; None for anything else.

    Raises:
        RunError: when reading it raises anything.
    """
    read = getattr(given, "tolist", None) or functools.partial(list, given)
    if not hasattr(given, "tolist") and (not isinstance(given, Sequence) or isinstance(given, str | bytes)):
        return None
    found = call(owner, read)
    return found if isinstance(found, list) else None  # an array without dimensions is a number


def without_gradients() -> AbstractContextManager[Any]:
    """``torch.no_grad()``, which holds for one thread only; nothing in a process that runs without torch."""
    torch = sys.modules.get("torch")
    return nullcontext() if torch is None else torch.no_grad()


def in_columns(owner: str, answers: Sequence[float | Score]) -> Scores:
    """The result of a function as scores.

    Raises:
        UserError: when a completion has other parts than the first.
    """
    rows = [answer if isinstance(answer, Score) else Score(answer, {}) for answer in answers]
    for index, row in enumerate(rows):
        check_names(owner, f"the parts of completion {index}", row.parts)
        if row.parts.keys() != rows[0].parts.keys():
            raise UserError(
                f"{owner} gave the parts {sorted(row.parts)} for completion {index}, but {sorted(rows[0].parts)} for "
                "completion 0; give every completion the same parts"
            )
    parts = list(rows[0].parts) if rows else []
    return Scores(
        [row.total for row in rows],
        {name: [row.parts[name] for row in rows] for name in parts},
        [row.turns for row in rows],
    )


def checked(name: str, shares: Sequence[Scores], completions: Sequence[Completion]) -> Scores:
    """The scores of a batch as floats, joined from those of its shares. A part that a share lacks is 0.0 there.

    Args:
        name: of the reward, for messages.
        shares: results of `ask` for adjacent completions, in order.

    Raises:
        UserError: when a score is not a finite number.
    """
    owner, total = f"reward {name}", [x for share in shares for x in share.total]
    columns = {
        part: [x for share in shares for x in share.parts.get(part, [0.0] * len(share.total))]
        for part in dict.fromkeys(part for share in shares for part in share.parts)
    }
    parts = {part: finite(owner, f"part {part!r}", values, completions) for part, values in columns.items()}
    turns = tuple(row for share in shares for row in share.turns)
    return Scores(finite(owner, "score", total, completions), parts, turns)
