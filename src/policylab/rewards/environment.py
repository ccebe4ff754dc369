"""The rewards of the task's environment, turn by turn. Only for tasks with an environment."""

from __future__ import annotations

from collections.abc import Sequence

from policylab.data.text import Completion
from policylab.errors import UserError
from policylab.rewards.base import Score


def environment(completions: Sequence[Completion]) -> list[Score]:
    """Each turn's reward, at the end of that turn; the sum of the turns is the completion's.

    Raises:
        UserError: when a completion has no turns.
    """
    if not all(completion.turns for completion in completions):
        raise UserError(
            "reward=environment: the completions have no turns, because the task has no environment; take the task's "
            "own reward"
        )
    return [_score(completion) for completion in completions]


def _score(completion: Completion) -> Score:
    turns = [turn for _, turn in completion.turns]
    names = dict.fromkeys(name for turn in turns for name in turn.parts)
    parts = {name: sum(turn.parts.get(name, 0.0) for turn in turns) for name in names}
    rewards = [turn.reward for turn in turns]
    return Score(sum(rewards), parts, rewards)
