"""The rewards of the task's environment, turn by turn. Only for tasks with an environment."""

from __future__ import annotations

from collections.abc import Sequence

from policylab.data.text import Completion
from policylab.errors import UserError
from policylab.rewards.base import Score


def environment(completions: Sequence[Completion]) -> list[Score]:
    """Each turn's reward, at the end of that turn; the sum of the turns is the completion's.

    The parts are those of any turn of any completion; where a turn has none, they count 0.

    Raises:
        UserError: when a completion has no turns.
    """
    if not all(completion.turns for completion in completions):
        raise UserError(
            "reward=environment: the completions have no turns, because the task has no environment; add "
            "reward=NAME, such as reward=sentiment for task=reviews"
        )
    names = dict.fromkeys(
        name for completion in completions for _, turn in completion.turns for name in turn.parts
    )
    return [_score(completion, tuple(names)) for completion in completions]


def _score(completion: Completion, names: Sequence[str]) -> Score:
    turns = [turn for _, turn in completion.turns]
    parts = {name: sum(turn.parts.get(name, 0.0) for turn in turns) for name in names}
    rewards = [turn.reward for turn in turns]
    return Score(sum(rewards), parts, rewards)
