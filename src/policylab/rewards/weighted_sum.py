"""A weighted sum of several rewards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from policylab.errors import UserError
from policylab.rewards.base import Reward, RewardFunction, Scores, ScoringBatch, check_reward, score
from policylab.rewards.state import load_state, state_of
from policylab.user_code import check_names


class WeightedSum:
    """The weighted sum of several rewards. Each is logged as ``train/reward/<name>``, its own parts below that.

    Args:
        parts: rewards by name.
        weights: a number for each of them.

    Raises:
        UserError: when the names differ, a name is empty or has a slash, a part is not a reward, or a weight is not a
            number.
    """

    def __init__(self, parts: Mapping[str, Reward | RewardFunction], weights: Mapping[str, float]) -> None:
        if not parts or parts.keys() != weights.keys():
            raise UserError(
                f"reward.weights has {', '.join(weights) or 'no name'}, and reward.parts {', '.join(parts) or 'none'}; "
                "give each part a weight"
            )
        check_names("reward", "reward.parts", parts)
        for name, part in parts.items():
            check_reward(part)
            if isinstance(weights[name], bool) or not isinstance(weights[name], int | float):
                raise UserError(f"reward.weights.{name}={weights[name]!r} is not a number")
        self.parts = dict(parts)
        self.weights = dict(weights)

    def score(self, batch: ScoringBatch) -> Scores:
        """The sum, and each part before it is weighted."""
        scores = {name: score(part, batch.completions, batch.device) for name, part in self.parts.items()}
        parts = {name: found.total for name, found in scores.items()}
        below = {
            f"{name}/{part}": values for name, found in scores.items() for part, values in found.parts.items()
        }
        turns = zip(*(found.turns for found in scores.values()), strict=True)
        return Scores(
            self._weigh(parts.values()),
            parts | below,
            [self._weigh(of_completion) for of_completion in turns],
        )

    def _weigh(self, columns: Iterable[Sequence[float]]) -> list[float]:
        """The weighted sum of each row; a column for each part."""
        weights = [self.weights[name] for name in self.parts]
        return [
            sum(weight * x for weight, x in zip(weights, row, strict=True))
            for row in zip(*columns, strict=True)
        ]

    def state_dict(self) -> dict[str, Any] | None:
        """The states of the parts; None if no part has one."""
        states = {name: state_of(part) for name, part in self.parts.items()}
        return states if any(state is not None for state in states.values()) else None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Gives each part its state."""
        for name, part in self.parts.items():
            load_state(part, state[name])
