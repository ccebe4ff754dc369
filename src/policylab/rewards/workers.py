"""Threads or processes that score shares of a batch at the same time."""

from __future__ import annotations

import atexit
import multiprocessing
import pickle
import signal
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from policylab.distributed.signals import SIGNALS
from policylab.errors import RunError, UserError
from policylab.rewards.base import Reward, RewardFunction, Scores, ScoringBatch, ask, reward_name
from policylab.rewards.networks import freeze_late
from policylab.user_code import call, said

#: Waits for the answer to a share of the completions.
Answer = Callable[[], Scores]


class Threads:
    """Workers in this process: `begin` hands each its share, `close` ends them."""

    def __init__(self, reward: Reward | RewardFunction, count: int) -> None:
        self.reward = reward
        self.executor = ThreadPoolExecutor(count, thread_name_prefix=f"reward-{reward_name(reward)}")

    def begin(self, shares: Sequence[ScoringBatch]) -> list[Answer]:
        return [self.executor.submit(ask, self.reward, share).result for share in shares]

    def close(self) -> None:
        self.executor.shutdown(wait=False, cancel_futures=True)


class Processes:
    """Workers in separate processes, spawned (not forked) with the first completions; networks are on the CPU.

    A worker exits when its pipe closes, however this process ends. It ignores signals, because this process handles
    them.
    """

    def __init__(self, reward: Reward | RewardFunction) -> None:
        self.name = reward_name(reward)
        try:
            self.sent = pickle.dumps(reward)
        except Exception as error:  # pickle raises errors of any type
            raise UserError(
                f"reward {self.name} cannot be sent to a process ({error}); take reward.pool=thread or reward.workers=0"
            ) from error
        self.running: list[tuple[Any, Connection]] = []
        self.asked = 0

    def begin(self, shares: Sequence[ScoringBatch]) -> list[Answer]:
        for number in range(len(self.running), len(shares)):
            self._start(number)
        self.asked += 1
        pending: list[Answer] = []
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
            if process.is_alive():  # still scoring, but the answer is not needed any more
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

    def _receive(self, process: Any, connection: Connection, question: int) -> Scores:
        answered = -1
        while answered != question:  # skips answers to earlier questions that were not awaited
            try:
                answered, answer = connection.recv()
            except (EOFError, ConnectionResetError):
                raise self._ended(process) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def _ended(self, process: Any) -> RunError:
        process.join(timeout=1)
        return RunError(f"a process of reward {self.name} exited by itself, with code {process.exitcode}")


def serve(connection: Connection, sent: bytes, name: str) -> None:
    """Runs in a worker process: scores each share that it is sent, until the pipe is closed.

    Args:
        sent: the reward, pickled; ``name``: its name in messages.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    reward: Reward | RewardFunction | None = None
    while True:
        try:
            question, share = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        answer: Scores | Exception
        try:
            if first := reward is None:  # here, so that an error in it is reported as an answer
                reward = call(f"reward {name}, sent to a process,", pickle.loads, sent)
            answer = ask(reward, share)  # in plain lists, so that no tensor crosses the pipe
            if first:
                freeze_late(reward)
        except Exception as error:
            answer = with_traceback(error)
        try:
            connection.send((question, answer))
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            answer = RunError(f"an answer of reward {name} cannot be sent from its process ({said(error)})")
            connection.send((question, answer))


def with_traceback(error: Exception) -> Exception:
    """The error, its traceback added as a note: a traceback itself cannot be pickled."""
    error.add_note("in a process of the reward:\n" + "".join(traceback.format_exception(error)))
    return error
