"""Tasks: training prompts, held-out prompts, and metrics on them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from policylab.contracts import check_members, refuse_state
from policylab.data.rollout import Completion, Prompt
from policylab.errors import UserError
from policylab.user_code import call, check_names, finite, handed_over, one_for_each, shown

log = logging.getLogger(__name__)

#: Names of validation metrics that every run has; a task's metric has another name.
RESERVED = frozenset({"reward", "length", "ended", "turns", "kl", "kl_token", "loss", "prompts"})


@dataclass(frozen=True)
class Example:
    """One row of a data set; ``text + completion`` is the whole text.

    Example: ``Example(text="the second half of", completion=" the film drags .", reference=None)``
    """

    text: str  #: the prompt
    completion: str  #: target of supervised training, with its leading space; may be ""
    reference: Any  #: ground truth for rewards and metrics; plain data
    where: str = field(default="", compare=False)  #: file and line, for messages; optional


class Task(Protocol):
    """A task, which ``task=NAME`` builds: any class with these members.

    A task with an environment also has ``environment()``, which creates a new
    :class:`~policylab.data.text.Environment` for each episode.
    """

    name: str
    instruction: str | None  #: prompt for chat models, with ``{text}`` in it; None sends the text alone
    train: Sequence[Example]
    val: Sequence[Example]

    def metrics(self, completions: Sequence[Completion]) -> Mapping[str, Sequence[float]]:
        """Numbers that are measured but never optimized, one for each completion; ``val/<name>`` is their mean."""
        ...


def measured(task: Task, completions: Sequence[Completion]) -> dict[str, list[float]]:
    """The task's metrics, checked: each has one number for each completion.

    Raises:
        UserError: when the task does not return a dict of metrics, or returns a reserved name, another number of values
            than completions, or a value that is not a finite number.
        RunError: when it raises anything.
    """
    owner, given = f"task {task.name}", handed_over(completions)
    metrics = call(f"{owner}: metrics", task.metrics, given, among=given)
    check_names(owner, "its metrics", metrics, nested=True)
    for name in metrics:
        if name in RESERVED or name.startswith(("reward/", "pass@")):
            raise UserError(
                f"{owner}: the metric {name!r} has the name of another one, val/{name}; rename it"
            )
    return {
        name: finite(
            owner, f"metric {name!r}", one_for_each(f"{owner}: metric {name!r}", values, len(given)), given
        )
        for name, values in metrics.items()
    }


def examples(task: Task, split: Literal["train", "val"]) -> list[Example]:
    """All rows of a split.

    Raises:
        UserError: when the task lacks a member or keeps state, or a row is not an example.
        RunError: when reading it raises anything.
    """
    check_members("task", task, Task)
    refuse_state(f"task {task.name}", task)
    if task.instruction is not None and "{text}" not in task.instruction:
        raise UserError(
            f"task.instruction={task.instruction!r} has no place for the prompt; put {{text}} in it, or take null"
        )
    rows = call(f"task {task.name}: {split}", lambda: list(getattr(task, split)))
    for number, row in enumerate(rows):
        if (
            not isinstance(row, Example)
            or not isinstance(row.text, str)
            or not isinstance(row.completion, str)
        ):
            raise UserError(
                f"row {number} of {split} of task {task.name} is {shown(row)}; it must be an Example with two texts"
            )
    return rows


def take_validation(task: Task, count: int) -> list[Example]:
    """The first ``count`` held-out rows, always the same ones; if there are fewer, all of them, with a warning.

    Raises:
        UserError: when there is none.
    """
    rows = examples(task, "val")
    if not rows:
        raise UserError(f"task {task.name} has no held-out prompt for validation; it must have at least one")
    if count > len(rows):
        log.warning(
            "validation.prompts=%d, but task %s has %d held-out prompts; all of them are used",
            *(count, task.name, len(rows)),
        )
    return rows[:count]


def data_fingerprint(train: Sequence[Prompt], val: Sequence[Example]) -> str:
    """A hash of a run's data: the training prompts, encoded, and all held-out rows. For a reference that is not plain
    data, only its type is hashed."""
    digest = hashlib.sha256()
    for prompt in train:
        digest.update(_plain((prompt.text, prompt.tokens, prompt.target, prompt.reference)))
    for example in val:
        digest.update(_plain((example.text, example.completion, example.reference)))
    return digest.hexdigest()


def _plain(row: tuple[Any, ...]) -> bytes:
    return json.dumps(row, skipkeys=True, default=lambda value: type(value).__name__).encode()
