"""reward.workers: worker processes give the same scores and the same error messages."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from traceback import format_exception as traceback_of

import pytest

from policylab.data.text import Completion
from policylab.errors import RunError, UserError
from policylab.rewards.base import Score, score
from policylab.rewards.optimality import optimality
from policylab.rewards.scorer import Scorer
from policylab.rewards.sentiment import sentiment
from policylab.runs.metrics_file import read_rows

ROOT = Path(__file__).parent.parent
TEXTS = [f" a {word} film" for word in ("good", "bad", "great", "dull", "moving", "long", "fine")]
COMPLETIONS = [Completion("it is", text, None, (1, 2, i), True) for i, text in enumerate(TEXTS)]


def place(completions: Sequence[Completion], scale: float) -> list[Score]:
    """Scores the last token; its parts are the process and the size of the share."""
    return [
        Score(scale * c.tokens[-1], {"process": float(os.getpid()), "share": float(len(completions))})
        for c in completions
    ]


def one_too_few(completions: Sequence[Completion]) -> list[float]:
    return [1.0] * (len(completions) - 1)


def not_finite(completions: Sequence[Completion]) -> list[float]:
    return [float("nan") if c.tokens[-1] == 5 else 1.0 for c in completions]


class Odd(Exception):
    """An error that cannot be recreated from its message."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what}: {why}")


def fails(completions: Sequence[Completion]) -> list[float]:
    raise ValueError("no server there")


def fails_oddly(completions: Sequence[Completion]) -> list[float]:
    raise Odd("odd", "very")


def stops(completions: Sequence[Completion]) -> list[float]:
    return [next(1.0 for _ in [0] if "dull" not in c.text) for c in completions]


def dies(completions: Sequence[Completion]) -> list[float]:
    os._exit(7)


def slow(completions: Sequence[Completion]) -> list[float]:
    time.sleep(0.3)
    return [1.0] * len(completions)


@pytest.fixture(params=["process", "thread"])
def pool(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def hands() -> Iterator:
    """``hands(reward, workers, pool)``, ended after the test."""
    made: list[Scorer] = []

    def give(reward, workers: int, pool: str) -> Scorer:
        made.append(Scorer(reward, workers, pool))
        return made[-1]

    yield give
    for scorer in made:
        with scorer:
            pass


class TestScores:
    @pytest.mark.parametrize("workers", [1, 2, 3, 9])
    def test_the_same_as_without(self, hands, workers):
        reward = hands(sentiment, workers, "thread")
        assert reward.begin(COMPLETIONS)() == score(sentiment, COMPLETIONS)
        assert reward.begin([])() == score(sentiment, [])

    def test_the_same_from_processes_in_order_and_in_even_shares(self, hands):
        reward = hands(partial(place, scale=2.0), 3, "process")
        for _ in range(2):  # the same processes, the same shares
            scores = reward.begin(COMPLETIONS)()
            assert scores.total == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 12.0]
            assert scores.parts["share"] == [2, 2, 2, 2, 3, 3, 3]
            assert len(set(scores.parts["process"])) == 3
            assert os.getpid() not in scores.parts["process"]

    def test_scoring_is_under_way_while_something_else_is_done(self, hands, pool):
        reward = hands(slow, 2, pool)
        reward.begin(COMPLETIONS)()  # processes are up
        start = time.perf_counter()
        scores = reward.begin(COMPLETIONS)
        begun = time.perf_counter() - start
        scores()
        assert begun < 0.2
        assert time.perf_counter() - start > 0.25

    def test_scores_that_were_never_read_are_skipped(self, hands):
        reward = hands(partial(place, scale=1.0), 2, "process")
        reward.begin(COMPLETIONS[:2])
        assert reward.begin(COMPLETIONS[4:])().total == [4.0, 5.0, 6.0]

    def test_without_workers_the_caller_scores(self):
        assert Scorer(sentiment).begin(COMPLETIONS)() == score(sentiment, COMPLETIONS)
        assert Scorer(sentiment).workers is None


class TestErrors:
    @pytest.mark.parametrize(
        ("reward", "message"),
        [
            (
                not_finite,
                r"reward not_finite gave nan as the score of completion 5 \('.*'\); it must be a finite number",
            ),
            (one_too_few, "reward one_too_few returned 2 scores for 3 completions"),
            (optimality, "reward=optimality found no map with the prompt"),
        ],
    )
    def test_bad_scores_are_told_in_the_same_line(self, hands, pool, reward, message):
        with pytest.raises(UserError, match=message):
            hands(reward, 2, pool).begin(COMPLETIONS[1:] if reward is one_too_few else COMPLETIONS)()

    @pytest.mark.parametrize(
        ("reward", "message"),
        [
            (fails, "ValueError: no server there"),
            (fails_oddly, "Odd: odd: very"),
            (stops, "StopIteration"),
        ],
    )
    def test_an_error_of_the_reward_is_told_in_one_line(self, hands, pool, reward, message):
        line = reward.__code__.co_firstlineno + 1
        with pytest.raises(
            RunError, match=rf"^reward {reward.__name__} failed at .*test_reward_pool\.py:{line}(?s:.*)"
        ) as caught:
            hands(reward, 2, pool).begin(COMPLETIONS)()
        assert str(caught.value).endswith(f": {message}")
        assert reward is not stops or " on the completion ' a dull film' of the prompt 'it is'" in str(
            caught.value
        )
        traceback = "".join(traceback_of(caught.value))
        assert f"in {reward.__name__}" in traceback

    def test_a_process_that_dies_is_told(self, hands):
        with pytest.raises(RunError, match="a process of reward dies exited by itself, with code 7"):
            hands(dies, 2, "process").begin(COMPLETIONS)()

    def test_a_reference_that_cannot_be_sent_is_told(self, hands):
        with pytest.raises(RunError, match="completions cannot be sent to a process of reward fails"):
            hands(fails, 1, "process").begin([replace(COMPLETIONS[0], reference=lambda: None)])

    def test_a_reward_that_cannot_be_sent_is_refused_at_once(self):
        with pytest.raises(
            UserError, match=r"reward <lambda> cannot be sent to a process .*reward.pool=thread"
        ):
            Scorer(lambda completions: [1.0], 2, "process")

    @pytest.mark.parametrize(
        ("workers", "pool", "message"),
        [
            (-1, "process", "reward.workers is -1"),
            (1.5, "process", "reward.workers=1.5 is not a whole number"),
            (2, "fork", "reward.pool=fork is not one of process, thread"),
        ],
    )
    def test_senseless_settings_are_refused(self, workers, pool, message):
        with pytest.raises(UserError, match=message):
            Scorer(sentiment, workers, pool)


class TestEnd:
    def test_workers_end_with_the_run(self, hands):
        reward = hands(partial(place, scale=1.0), 2, "process")
        with reward:
            processes = {int(p) for p in reward.begin(COMPLETIONS)().parts["process"]}
        assert len(processes) == 2
        assert gone(processes)

    def test_threads_end_with_the_run(self, hands):
        reward = hands(slow, 2, "thread")
        with reward:
            reward.begin(COMPLETIONS)()
        wait_for(lambda: not any(t.name.startswith("reward-slow") for t in threading.enumerate()))

    @pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
    def test_no_process_is_left_behind(self, tmp_path, signum):
        """However the main process ends. Workers ignore a signal to the whole group, which the main process handles."""
        script = tmp_path / "main.py"
        script.write_text(
            "import sys, time, functools\n"
            "from test_reward_pool import COMPLETIONS, place\n"
            "from policylab.rewards.scorer import Scorer\n"
            "if __name__ == '__main__':\n"
            "    reward = Scorer(functools.partial(place, scale=1.0), 2, 'process')\n"
            "    print(*{int(p) for p in reward.begin(COMPLETIONS)().parts['process']}, flush=True)\n"
            "    time.sleep(60)\n"
        )
        environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests'}{os.pathsep}{ROOT / 'src'}"}
        main = subprocess.Popen(
            [sys.executable, str(script)],
            env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        assert main.stdout is not None
        processes = {int(word) for word in main.stdout.readline().split()}
        assert len(processes) == 2
        if signum == signal.SIGTERM:
            os.killpg(main.pid, signum)
        else:
            main.send_signal(signum)
        main.wait(timeout=10)
        assert gone(processes)


def gone(processes: set[int]) -> bool:
    wait_for(lambda: not any(Path(f"/proc/{number}").exists() and alive(number) for number in processes))
    return True


def alive(number: int) -> bool:
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(condition) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_run_scores_alike_with_workers(train_briefly, tmp_path):
    """The metrics of a run do not depend on where its reward is computed."""
    rewards = []
    for words in ([], ["reward.workers=2"]):
        folder = train_briefly(["model=tiny_scratch", "callbacks=none", *words])
        rewards.append([row.get("train/reward") for row in read_rows(folder / "metrics.csv")])
        folder.rename(tmp_path / f"run{len(rewards)}")
    assert rewards[0] == rewards[1]
    assert any(rewards[0])
