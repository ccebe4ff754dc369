"""The reward of a run, with its workers, its device and its state.

Scoring starts as soon as there are completions, and the scores are awaited when they are needed; meanwhile the
reference's log-probs are computed. Each worker gets a share of the completions; scores keep the completions' order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Self

from policylab.data.text import Completion
from policylab.errors import UserError, check_range
from policylab.rewards.base import (
    Reward,
    RewardFunction,
    Scores,
    ScoringBatch,
    check_reward,
    checked,
    reward_name,
    score,
)
from policylab.rewards.networks import freeze, freeze_late, move
from policylab.rewards.state import load_state, state_of
from policylab.rewards.workers import Processes, Threads

#: More would be a typing error.
MOST_WORKERS = 1024
#: Waits for scores that are being computed.
ScoreFuture = Callable[[], Scores]


class Scorer:
    """Scores completions with a reward. Its networks are frozen. It is not an ``nn.Module``, so they are not in the
    state of another module.

    Args:
        reward: a function of completions, or an object with ``score``.
        workers: number of workers that score shares of the completions; with 0 the caller scores them all.
        pool: ``process`` for rewards that compute, ``thread`` for those that wait.

    Raises:
        UserError: when it is not a reward, a setting is out of bounds, or workers cannot have the reward, because it
            keeps state or cannot be sent to a process.
    """

    def __init__(self, reward: Reward | RewardFunction, workers: int = 0, pool: str = "process") -> None:
        check_reward(reward)
        if not isinstance(workers, int) or isinstance(workers, bool):
            raise UserError(f"reward.workers={workers!r} is not a whole number")
        check_range("reward.workers", workers, 0, MOST_WORKERS)
        if pool not in ("process", "thread"):
            raise UserError(f"reward.pool={pool} is not one of process, thread")
        if workers and state_of(reward) is not None:
            raise UserError(
                f"reward {reward_name(reward)} keeps state (it has a state_dict), and each worker would have its own; "
                "take reward.workers=0"
            )
        freeze(reward)
        self.reward = reward
        self.device = "cpu"
        self.scored = False
        self.count = workers
        self.workers: Processes | Threads | None = None
        if workers:
            self.workers = Processes(reward) if pool == "process" else Threads(reward, workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.workers is not None:
            self.workers.close()

    def begin(self, completions: Sequence[Completion]) -> ScoreFuture:
        """Starts scoring; without workers, computes the scores at once.

        Raises:
            UserError, RunError: as `policylab.rewards.base.score`, here or by the future.
        """
        if self.workers is None:
            scores = score(self.reward, completions, self.device)
            self._freeze_late()
            return lambda: scores
        count = min(self.count, len(completions))
        cuts = [len(completions) * i // count for i in range(count + 1)] if count else []
        shares = [ScoringBatch(tuple(completions[a:b]), self.device) for a, b in pairwise(cuts)]
        answers = self.workers.begin(shares)

        def wait() -> Scores:
            found = [answer() for answer in answers]
            self._freeze_late()
            return checked(reward_name(self.reward), found, completions)

        return wait

    def move(self, device: Any) -> None:
        """Moves the reward's networks to a device. Those in worker processes stay on the CPU."""
        if not isinstance(self.workers, Processes):
            move(self.reward, device)
            self.device = str(device)

    def _freeze_late(self) -> None:
        """After the first scores: networks that the reward has made only then. A process of a worker has its own."""
        if not self.scored:
            freeze_late(self.reward)
        self.scored = True

    def state(self) -> Any:
        """The reward's state, for a checkpoint; None without one."""
        return state_of(self.reward)

    def load_state(self, state: Any) -> None:
        """Gives the reward the state of a checkpoint; None: no change."""
        load_state(self.reward, state)
