"""Rewards computed beside the training process, so that their cost lies off the critical path.

Scoring is begun when the completions are there, and its outcome asked for when it is needed; in between the
reference's log-probs are computed. Each worker gets its share of the completions, and answers come in their order.
"""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol

from policylab.data.text import Completion
from policylab.distributed.signals import SIGNALS
from policylab.errors import RunError, UserError, demand
from policylab.rewards.base import Reward, Score, Scores, ask, checked, demand_reward, reward_name, score
from policylab.rewards.memory import has_state
from policylab.rewards.networks import frozen
from policylab.user_code import call, said

#: More would be a slip of the finger.
MOST_WORKERS = 1024
#: Waits for scores that are being computed, and returns them.
ScoreFuture = Callable[[], Scores]
#: The same for the answers to a share of the completions.
Answers = Callable[[], list[Score]]


class Workers(Protocol):
    """Who scores."""

    def begin(self, shares: Sequence[Sequence[Completion]]) -> list[Answers]:
        """Hands each worker its share, and returns at once."""
        ...

    def close(self) -> None:
        """Ends them."""
        ...


class PooledReward:
    """A reward whose completions are scored by several workers at once.

    Args:
        reward: scores each completion by itself: a worker sees none but its share.
        workers: how many, at least 1.
        pool: ``process`` for rewards that compute, ``thread`` for those that wait.

    Raises:
        UserError: when the reward cannot be sent to a process, or remembers what checkpoints must hold.
    """

    def __init__(self, reward: Reward, workers: int, pool: Literal["process", "thread"]) -> None:
        self.name = reward_name(reward)
        if has_state(reward):
            raise UserError(
                f"reward {self.name} remembers (it has a state_dict), and workers would remember their own share each; "
                "take reward.workers=0"
            )
        self.count = workers
        self.workers: Workers = Processes(reward) if pool == "process" else Threads(reward, workers)

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        """As any reward: the answers, when they are there."""
        return [answer for share in self.workers.begin(self.shares(completions)) for answer in share()]

    def begin(self, completions: Sequence[Completion]) -> ScoreFuture:
        """Scoring under way."""
        shares = self.workers.begin(self.shares(completions))
        return lambda: checked(self.name, [answer for share in shares for answer in share()], completions)

    def shares(self, completions: Sequence[Completion]) -> list[Sequence[Completion]]:
        """Adjacent completions, as many for each worker as for the next, up to one."""
        count = min(self.count, len(completions))
        cuts = [len(completions) * i // count for i in range(count + 1)] if count else []
        return [completions[first:last] for first, last in pairwise(cuts)]


class Threads:
    """Workers in this process."""

    def __init__(self, reward: Reward, count: int) -> None:
        self.reward = reward
        self.executor = ThreadPoolExecutor(count, thread_name_prefix=f"reward-{reward_name(reward)}")

    def begin(self, shares: Sequence[Sequence[Completion]]) -> list[Answers]:
        return [self.executor.submit(ask, self.reward, share).result for share in shares]

    def close(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)


class Processes:
    """Workers in processes of their own, started afresh with the first completions: nothing of this one is forked.

    They end when their pipe does, in whatever way this process ends; signals are for this process to answer.
    """

    def __init__(self, reward: Reward) -> None:
        self.name = reward_name(reward)
        try:
            self.sent = pickle.dumps(reward)
        except Exception as error:  # pickle raises what it likes
            raise UserError(
                f"reward {self.name} cannot be sent to a process ({error}); take reward.pool=thread or reward.workers=0"
            ) from error
        self.running: list[tuple[Any, Connection]] = []
        self.asked = 0

    def begin(self, shares: Sequence[Sequence[Completion]]) -> list[Answers]:
        for number in range(len(self.running), len(shares)):
            self._start(number)
        self.asked += 1
        pending: list[Answers] = []
        for (process, connection), share in zip(self.running, shares, strict=False):
            try:
                connection.send((self.asked, share))
            except (BrokenPipeError, ConnectionResetError):
                raise self._ended(process) from None
            except (pickle.PicklingError, AttributeError, TypeError) as error:
                raise RunError(
                    f"completions cannot be sent to a process of reward {self.name} ({said(error)}); references are "
                    "plain data, or take reward.pool=thread or reward.workers=0"
                ) from error
            pending.append(partial(self._receive, process, connection, self.asked))
        return pending

    def close(self) -> None:
        atexit.unregister(self.close)
        for _, connection in self.running:
            connection.close()
        for process, _ in self.running:
            process.join(timeout=1)
            if process.is_alive():  # in the middle of an answer that nobody waits for
                process.kill()
        self.running = []

    def _start(self, number: int) -> None:
        if number == 0:
            atexit.register(self.close)
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(
            target=serve, args=(there, self.sent, self.name), name=f"reward-{self.name}-{number}"
        )
        process.start()
        there.close()
        self.running.append((process, here))

    def _receive(self, process: Any, connection: Connection, question: int) -> list[Score]:
        answered = -1
        while answered != question:  # what was begun and never asked for is passed over
            try:
                answered, answer = connection.recv()
            except (EOFError, ConnectionResetError):
                raise self._ended(process) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ended(self, process: Any) -> RunError:
        process.join(timeout=1)
        return RunError(f"a process of reward {self.name} ended by itself, with code {process.exitcode}")


def serve(connection: Connection, sent: bytes, name: str) -> None:
    """The life of a worker process: answers each share, until nobody asks any more.

    Args:
        sent: the reward, pickled; ``name``: how messages call it.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    reward: Reward | None = None
    while True:
        try:
            question, share = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        answer: list[Score] | Exception
        try:
            if reward is None:  # here, so that what is wrong with it is told
                reward = call(f"reward {name}, sent to a process,", pickle.loads, sent)
            answer = ask(reward, share)
        except Exception as error:
            answer = with_traceback(error)
        try:
            connection.send((question, answer))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            answer = RunError(f"an answer of reward {name} cannot be sent from its process ({said(error)})")
            connection.send((question, answer))


def with_traceback(error: Exception) -> Exception:
    """The error with its traceback, which cannot be sent, as a note."""
    error.add_note("in a process of the reward:\n" + "".join(traceback.format_exception(error)))
    return error


def pooled(reward: Reward, workers: int | None, pool: str | None) -> Reward:
    """The reward itself, or in the hands of workers; a network is frozen.

    Args:
        workers: None or 0 scores in the caller's thread.
        pool: ``process`` or ``thread``.

    Raises:
        UserError: when it cannot be called with completions, a setting is out of its bounds, or it cannot be sent to
            a process.
    """
    demand_reward(reward)
    if workers is not None and (not isinstance(workers, int) or isinstance(workers, bool)):
        raise UserError(f"reward.workers={workers!r} is not a whole number")
    demand("reward.workers", workers, 0, MOST_WORKERS)
    if pool not in (None, "process", "thread"):
        raise UserError(f"reward.pool={pool} is not one of process, thread")
    reward = frozen(reward)
    if not workers:
        return reward
    return PooledReward(reward, workers, pool)  # type: ignore[arg-type]


def in_this_process(reward: Reward) -> Reward | None:
    """The reward that scores in this process, maybe in threads; None where processes of its own do."""
    if not isinstance(reward, PooledReward):
        return reward
    return reward.workers.reward if isinstance(reward.workers, Threads) else None


def begin(reward: Reward, completions: Sequence[Completion]) -> ScoreFuture:
    """Scores to come; of a reward without workers they are there at once.

    Raises:
        UserError: as `policylab.rewards.base.score`, now or when the scores are asked for.
    """
    if isinstance(reward, PooledReward):
        return reward.begin(completions)
    scores = score(reward, completions)
    return lambda: scores


@contextmanager
def ended_workers(reward: Reward) -> Iterator[None]:
    """Ends the workers of a reward, if it has any."""
    try:
        yield
    finally:
        if isinstance(reward, PooledReward):
            reward.workers.close()
