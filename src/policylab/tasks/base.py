"""What a task is: prompts to train on, prompts held out, and what is measured on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from policylab.errors import UserError
from policylab.rollouts.types import Completion


@dataclass(frozen=True)
class Example:
    """One row of a data set; ``text + completion`` is the whole text.

    Example: ``Example(text="the second half of", completion=" the film drags .", reference=None)``
    """

    text: str  #: the prompt
    completion: str  #: what supervised training continues it with, leading space included; "" if nothing
    reference: Any  #: ground truth for rewards and metrics; plain data


class Task(Protocol):
    """What ``task=NAME`` builds. Any class with these members will do."""

    name: str
    instruction: str | None  #: how chat models are asked, with ``{text}`` in it; None sends the bare prompt
    train: Sequence[Example]
    val: Sequence[Example]

    def metrics(self, completions: Sequence[Completion]) -> dict[str, list[float]]:
        """Numbers to watch but never to optimise, one a completion; ``val/<name>`` is their mean."""
        ...


def take_validation(task: Task, count: int) -> Sequence[Example]:
    """The first rows held out, always the same ones.

    Raises:
        UserError: when the task has fewer.
    """
    if not 0 < count <= len(task.val):
        raise UserError(
            f"validation.prompts={count}, but task {task.name} holds out {len(task.val)} prompts; "
            f"take 1 to {len(task.val)}"
        )
    return task.val[:count]
