"""Rewards: hand-computed scores, and answers that `score` refuses."""

from __future__ import annotations

import math
import os
import signal
import sys
from functools import partial
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from policylab.data.rollout import Completion
from policylab.errors import RunError, UserError
from policylab.rewards.base import Score, Scores, ScoringBatch, check_reward, score
from policylab.rewards.optimality import optimality
from policylab.rewards.scorer import Scorer
from policylab.rewards.sentiment import sentiment
from policylab.rewards.state import load_state, state_of
from policylab.rewards.weighted_sum import WeightedSum
from policylab.tasks.base import measured
from policylab.user_code import short_path


def completion(text: str, prompt: str = "the film is", reference: Any = None) -> Completion:
    return Completion(prompt=prompt, text=text, reference=reference, tokens=(1,), ended=True)


TWO = [completion(" good"), completion(" bad")]


def constant(answer: Any) -> Any:
    """A reward that always returns this answer."""

    def stubborn(completions: Any) -> Any:
        return answer

    return stubborn


class TestScore:
    def test_numbers_of_any_library(self):
        assert score(constant([1, True]), TWO) == Scores([1.0, 1.0], {})
        assert score(constant(np.array([0.5, -1.0])), TWO).total == [0.5, -1.0]
        assert score(constant(torch.tensor([0.5, -1.0])), TWO).total == [0.5, -1.0]

    def test_parts_keep_the_order_of_completions(self):
        answers = [Score(1.0, {"a": 2.0, "b": 3.0}), Score(4.0, {"b": 6.0, "a": 5.0})]
        assert score(constant(answers), TWO) == Scores([1.0, 4.0], {"a": [2.0, 5.0], "b": [3.0, 6.0]})

    def test_no_completions(self):
        assert score(sentiment, []) == Scores([], {})

    def test_a_partial_is_called_by_its_function_s_name(self):
        def graded(completions: Any, grade: float) -> list[float]:
            return [grade]

        with pytest.raises(UserError, match="reward graded returned 1 score for 2 completions"):
            score(partial(graded, grade=1.0), TWO)

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ([1.0], "reward stubborn returned 1 score for 2 completions"),
            ([1.0, 2.0, 3.0], "reward stubborn returned 3 scores for 2 completions"),
            (0.5, "reward stubborn returned 0.5; it must return a list of 2 scores, one for each completion"),
            (None, "reward stubborn returned None"),
            ("ab", "reward stubborn returned 'ab'; it must return a list"),
            (b"ab", "reward stubborn returned b'ab'; it must return a list"),
            ({0: 1.0, 1: 2.0}, r"reward stubborn returned \{0: 1.0, 1: 2.0\}; it must return a list"),
            ({1.0, 2.0}, r"reward stubborn returned \{1.0, 2.0\}; it must return a list"),
            ((x for x in (1.0, 2.0)), "reward stubborn returned <generator .*; it must return a list"),
            ({0: 1.0, 1: 2.0}.values(), r"returned dict_values\(.*; it must return a list"),
            (np.ones((2, 1)), r"returned an array of shape \(2, 1\); it must return a list"),
            (torch.ones(()), r"returned an array of shape \(\); it must return a list"),
            ([np.ones(1), 1.0], r"gave array\(\[1.\]\) as the score of completion 0"),
            ([[1.0], [1.0]], r"gave \[1.0\] as the score of completion 0"),
            ([b"1", 1.0], "gave b'1' as the score of completion 0"),
            ([10**400, 1.0], r"gave 10+\.\.\. as the score of completion 0"),
            ([10**5000, 1.0], "gave <int> as the score of completion 0"),
            ([1e39, 1.0], "gave 1e\\+39 as the score of completion 0"),
            ([Score(1.0, {1: 1.0}), 1.0], "gave 1 as a name in the parts of completion 0"),
            (
                [Score(1.0, {"a": 0.0, "b\n": 1.0}), 1.0],
                r"gave 'b\\n' as a name in the parts of completion 0",
            ),
            (
                [Score(1.0, {"": 1.0}), 1.0],
                "gave '' as a name in the parts of completion 0; a name is not empty",
            ),
            ([Score(1.0, {"a/b": 1.0}), 1.0], "gave 'a/b' as a name in the parts of completion 0"),
            ([Score(1.0, None), 1.0], "gave None as the parts of completion 0"),
            ([1.0, None], r"gave None as the score of completion 1 \('.*'\); it must be a finite number"),
            ([math.nan, 1.0], "gave nan as the score of completion 0"),
            ([1.0, math.inf], "gave inf as the score of completion 1"),
            (["0.5", 1.0], "gave '0.5' as the score of completion 0"),
            ([Score(1.0, {"a": 1.0}), Score(1.0, {"a": math.nan})], "nan as the part 'a' of completion 1"),
            ([Score(1.0, {"a": 1.0}), Score(1.0, {"b": 1.0})], r"gave the parts \['b'\] for completion 1"),
            ([Score(1.0, {"a": 1.0}), 1.0], r"gave the parts \[\] for completion 1, but \['a'\]"),
            ([1.0, Score(1.0, {"a": 1.0})], r"gave the parts \['a'\] for completion 1, but \[\]"),
        ],
    )
    def test_refuses(self, answer: Any, message: str):
        with pytest.raises(UserError, match=message):
            score(constant(answer), TWO)


class ByBatch:
    """A reward with ``score(batch)`` that gives these scores."""

    def __init__(self, scores: Any) -> None:
        self.scores = scores

    def score(self, batch: ScoringBatch) -> Any:
        return self.scores


class Counting:
    """A reward that counts what it has scored."""

    def __init__(self, state: Any = None) -> None:
        self.seen = 0

    def __call__(self, completions: Any) -> list[float]:
        self.seen += len(completions)
        return [float(self.seen)] * len(completions)

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.seen = state["seen"]


class TestObjects:
    def test_a_reward_with_a_method_score(self):
        reward = ByBatch(Scores(torch.tensor([1.0, 2.0]), {"a": np.array([3, 4])}))
        check_reward(reward)
        assert score(reward, TWO) == Scores([1.0, 2.0], {"a": [3.0, 4.0]})
        assert score(ByBatch(Scores([1, 2])), TWO) == Scores([1.0, 2.0], {})

    @pytest.mark.parametrize(
        ("scores", "message"),
        [
            ([1.0, 2.0], r"reward ByBatch returned \[1.0, 2.0\]; score\(batch\) must return Scores"),
            (Scores([1.0]), "reward ByBatch returned 1 score for 2 completions"),
            (Scores([1.0, 2.0], {"a": [1.0]}), "reward ByBatch: part 'a' returned 1 score "),
            (Scores([1.0, 2.0], {"a\nb": [1.0, 1.0]}), r"gave 'a\\nb' as a name in its parts"),
            (Scores([1.0, 2.0], {"a": [1.0, math.nan]}), "gave nan as the part 'a' of completion 1"),
        ],
    )
    def test_its_scores_are_checked_alike(self, scores: Any, message: str):
        with pytest.raises(UserError, match=message):
            score(ByBatch(scores), TWO)

    def test_a_layer_called_score_is_no_method(self):
        class Classifier(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.score = torch.nn.Linear(1, 1)

            def forward(self, completions: Any) -> list[float]:
                return [1.0] * len(completions)

        assert score(Classifier(), TWO).total == [1.0, 1.0]

    def test_a_call_of_its_own_comes_before_a_helper_called_score(self):
        class Graded:
            def __call__(self, completions: Any) -> list[float]:
                return [self.score(completion.text) for completion in completions]

            def score(self, text: str) -> float:
                return float(len(text))

        check_reward(Graded())
        assert score(Graded(), TWO).total == [5.0, 4.0]

        class Network(torch.nn.Module):
            def score(self, batch: ScoringBatch) -> Scores:
                return Scores([1.0] * len(batch.completions))

        assert score(Network(), TWO).total == [1.0, 1.0], "the call is torch's"


class TestWeightedSum:
    def test_it_adds_and_logs_each_part(self):
        parts = {
            "kind": constant([Score(1.0, {"a": 5.0}), Score(2.0, {"a": 6.0})]),
            "brief": constant([0.5, 1.0]),
        }
        found = score(WeightedSum(parts, {"kind": 2.0, "brief": -1.0}), TWO)
        assert found == Scores([1.5, 3.0], {"kind": [1.0, 2.0], "brief": [0.5, 1.0], "kind/a": [5.0, 6.0]})

    def test_a_part_s_mistake_is_told_by_its_name(self):
        with pytest.raises(UserError, match="reward stubborn returned 1 score for 2 completions"):
            score(WeightedSum({"kind": constant([1.0])}, {"kind": 1.0}), TWO)

    def test_names_and_parts_are_checked(self):
        with pytest.raises(UserError, match=r"reward\.weights has b, and reward\.parts a; give each part"):
            WeightedSum({"a": sentiment}, {"b": 1.0})
        with pytest.raises(UserError, match="reward: 3 cannot be called"):
            WeightedSum({"a": 3}, {"a": 1.0})
        with pytest.raises(UserError, match=r"reward\.weights\.a='much' is not a number"):
            WeightedSum({"a": sentiment}, {"a": "much"})
        with pytest.raises(
            UserError, match=r"'a/b' as a name in reward\.parts; a name is not empty and has no"
        ):
            WeightedSum({"a": sentiment, "a/b": sentiment}, {"a": 1.0, "a/b": 1.0})

    def test_its_state_is_that_of_its_parts(self):
        def build() -> WeightedSum:
            return WeightedSum({"counting": Counting(), "kind": sentiment}, {"counting": 1.0, "kind": 1.0})

        first, second = build(), build()
        score(first, TWO)
        assert state_of(first) == {"counting": {"seen": 2}, "kind": None}
        load_state(second, state_of(first))
        assert score(second, TWO) == score(first, TWO)
        assert state_of(WeightedSum({"kind": sentiment}, {"kind": 1.0})) is None
        with pytest.raises(UserError, match="reward WeightedSum keeps state"):
            Scorer(first, workers=1, pool="thread")


def changes_its_argument(completions: Any) -> list[float]:
    completions.sort(key=lambda completion: completion.text)
    return [1.0] * len(completions)


def changes_references(completions: Any) -> list[float]:
    return [completion.reference["left"].pop() for completion in completions]


def stops(completions: Any) -> list[float]:
    return [next(1.0 for _ in [0] if "bad" not in completion.text) for completion in completions]


def raises(error: BaseException) -> Any:
    def raises(completions: Any) -> list[float]:
        raise error

    return raises


def quits(completions: Any) -> list[float]:
    sys.exit(0)


class Lazy(list):
    def __iter__(self) -> Any:
        raise StopIteration


class TestUserCode:
    """User code never ends a run without a message, and changes only its own copies."""

    def test_stop_iteration_is_told_with_its_line_and_completion(self):
        line = stops.__code__.co_firstlineno + 1
        with pytest.raises(
            RunError,
            match=rf"^reward stops failed at .*test_rewards\.py:{line} on the completion ' bad' of the prompt "
            "'the film is': StopIteration$",
        ) as caught:
            score(stops, TWO)
        assert isinstance(caught.value.__cause__, StopIteration), "train.log gets its traceback"

    def test_an_exit_is_an_error(self):
        with pytest.raises(RunError, match=r"reward quits failed at .*test_rewards\.py:\d+: SystemExit: 0"):
            score(quits, TWO)

    def test_an_interrupt_of_its_own_is_an_error_with_its_line(self, monkeypatch: pytest.MonkeyPatch):
        """In a run, Ctrl-C is a signal that a handler of ours turns into a subclass."""

        class Ours(KeyboardInterrupt):
            pass

        handler = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            with pytest.raises(
                RunError, match=r"reward raises failed at .*py:\d+.*: KeyboardInterrupt: mine"
            ):
                score(raises(KeyboardInterrupt("mine")), TWO)
            with pytest.raises(Ours):
                score(raises(Ours()), TWO)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with pytest.raises(KeyboardInterrupt):
                score(raises(KeyboardInterrupt()), TWO)
        finally:
            signal.signal(signal.SIGINT, handler)

    def test_a_reward_may_change_the_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        shown = short_path(__file__)
        assert Path(shown).name == "test_rewards.py"

        def changes_folder(completions: Any) -> list[float]:
            os.chdir(tmp_path)
            return [1.0] * len(completions)

        monkeypatch.chdir(Path.cwd())  # comes back afterwards
        score(changes_folder, TWO)
        assert Path.cwd() == tmp_path
        assert short_path(__file__) == shown

    def test_an_answer_that_cannot_be_read(self):
        with pytest.raises(RunError, match=r"reward stubborn failed at .*: StopIteration"):
            score(constant(Lazy([1.0, 2.0])), TWO)

    def test_a_user_error_is_told_as_it_is(self):
        with pytest.raises(UserError, match=r"^reward=optimality found no map"):
            score(optimality, TWO)

    def test_the_list_of_completions_cannot_be_changed(self):
        with pytest.raises(RunError, match="'tuple' object has no attribute 'sort'"):
            score(changes_its_argument, TWO)

    def test_references_are_copies(self):
        completions = [
            completion(" good", reference={"left": [1.0]}),
            completion(" bad", reference={"left": [2.0]}),
        ]
        assert score(changes_references, completions) == score(changes_references, completions)
        with pytest.raises(RunError, match=r"copying the references \(they must be plain data\) failed"):
            score(constant([1.0]), [completion("", reference=sys)])

    def test_task_metrics_are_checked_in_the_same_way(self):
        def metrics(answer: Any) -> Any:
            task = SimpleNamespace(name="mine", metrics=constant(answer))
            return lambda: measured(task, TWO)

        assert metrics({"words": np.array([1, 2])})() == {"words": [1.0, 2.0]}
        for answer, message in (
            (None, "task mine gave None as its metrics; it must be a dict"),
            ({"words": [1.0]}, "task mine: metric 'words' returned 1 score for 2 completions"),
            ({"words": "ab"}, "task mine: metric 'words' returned 'ab'"),
            ({"words": [1.0, math.nan]}, "task mine gave nan as the metric 'words' of completion 1"),
            (
                {"reward": [1.0, 1.0]},
                "task mine: the metric 'reward' has the name of another one, val/reward",
            ),
            ({"reward/x": [1.0, 1.0]}, "task mine: the metric 'reward/x' has the name of another one"),
        ):
            with pytest.raises(UserError, match=message):
                metrics(answer)()
        with pytest.raises(
            RunError, match=r"task mine: metrics failed at .*on the completion ' bad'.*StopIteration"
        ):
            measured(SimpleNamespace(name="mine", metrics=stops), TWO)


class TestWhatARewardIs:
    def test_callables_of_one_argument(self):
        for reward in (sentiment, partial(sentiment), torch.nn.Identity(), len):
            check_reward(reward)

    @pytest.mark.parametrize(
        ("reward", "message"),
        [
            (
                lambda prompts, completions, **kw: [1.0],
                "cannot be called with completions alone .*'completions'",
            ),
            (partial(lambda completions, words: [1.0]), "cannot be called with completions alone .*'words'"),
            (lambda: [1.0], "cannot be called with completions alone"),
            (partial(Lazy), "reward Lazy is a class: give reward._partial_=false"),
            (3, "reward: 3 cannot be called; a reward is a function"),
        ],
    )
    def test_refuses(self, reward: Any, message: str):
        with pytest.raises(UserError, match=message):
            check_reward(reward)


class TestSentiment:
    def test_literals(self):
        """Scores that VADER 3.3.2 gives; "good" is 1.9 in its lexicon: 1.9 / sqrt(1.9^2 + 15) = 0.4404."""
        texts = [" good", " not good", " a great, moving film", " a dull mess", " about trains", ""]
        scores = score(sentiment, [completion(text) for text in texts])
        assert scores.total == [0.4404, -0.3412, 0.6249, -0.6369, 0.0, 0.0]
        assert scores.parts["positive"][0] == 1.0
        assert scores.parts["negative"][0] == 0.0
        assert scores.parts.keys() == {"positive", "negative"}

    def test_the_prompt_does_not_count(self):
        assert score(sentiment, [completion(" about trains", prompt="a wonderful film")]).total == [0.0]


class TestOptimality:
    """A graph of four nodes: b -> a, b -> c, c -> b, d -> c; d needs d, c, b, a."""

    EDGES = MappingProxyType({"a": "a", "b": "ac", "c": "b", "d": "c"})

    def score(self, prompt: str, text: str, shortest: int) -> Score:
        here = {"edges": self.EDGES, "goal": "a", "shortest": shortest, "max_length": 6}
        return optimality([completion(text, prompt, here)])[0]

    @pytest.mark.parametrize(
        ("prompt", "text", "shortest", "total", "valid", "reached"),
        [
            ("b", "a", 2, 1.0, 1, 1),
            ("b", "cba", 2, 0.5, 1, 1),  # (6 - 4) / (6 - 2)
            ("b", "cbcba", 2, 0.0, 1, 1),  # arrives with the last node allowed
            ("b", "cbcbcba", 2, 0.0, 1, 0),  # too late
            ("d", "cba", 4, 1.0, 1, 1),
            ("d", "cbcba", 4, 0.0, 1, 1),
            ("b", "c", 2, 0.0, 1, 0),  # does not arrive
            ("b", "", 2, 0.0, 1, 0),
            ("d", "a", 4, 0.0, 0, 0),  # no such edge
            ("b", "dba", 2, 0.0, 0, 0),
            ("b", "?a", 2, 0.0, 0, 0),  # no such node
            ("b", "addd", 2, 1.0, 1, 1),  # nodes after the goal do not count
        ],
    )
    def test_literals(
        self, prompt: str, text: str, shortest: int, total: float, valid: float, reached: float
    ):
        expected = Score(total, {"valid": valid, "reached": reached})
        assert self.score(prompt, text, shortest) == expected

    def test_a_start_without_a_way_to_the_goal_scores_nothing(self):
        assert self.score("b", "cbcbc", shortest=6).total == 0.0

    def test_refuses_prompts_of_another_task(self):
        with pytest.raises(UserError, match="it goes with task=random_walks"):
            optimality(TWO)
