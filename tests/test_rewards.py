"""Rewards: literals, and what `score` refuses."""

from __future__ import annotations

import math
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch

from policylab.errors import UserError
from policylab.rewards.base import Score, Scores, score
from policylab.rewards.optimality import optimality
from policylab.rewards.sentiment import sentiment
from policylab.rollouts.types import Completion


def completion(text: str, prompt: str = "the film is", reference: Any = None) -> Completion:
    return Completion(prompt=prompt, text=text, reference=reference, tokens=(1,), ended=True)


TWO = [completion(" good"), completion(" bad")]


def constant(answer: Any) -> Any:
    """A reward that always gives this answer."""

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

        with pytest.raises(UserError, match="reward graded returned 1 scores for 2 completions"):
            score(partial(graded, grade=1.0), TWO)

    @pytest.mark.parametrize(
        ("answer", "message"),
        [
            ([1.0], "reward stubborn returned 1 scores for 2 completions"),
            ([1.0, 2.0, 3.0], "reward stubborn returned 3 scores for 2 completions"),
            (0.5, "reward stubborn returned 0.5; it must return one score for each of the 2 completions"),
            (None, "reward stubborn returned None"),
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
            ("b", "addd", 2, 1.0, 1, 1),  # what stands after the goal does not count
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
