"""trlX's toy task: the same seed gives the same graph, walks and scores.

The literals were taken from trlX's own ``generate_random_walks(seed=1002)``. It was run beside this code on
five seeds and three sizes of graph with 3,300 walks each: all walks and scores were equal (to 1e-6), but for
one graph whose goal cannot be reached, where trlX divides 0 by 0 and gets no number; such a graph is drawn anew here.
"""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
from numpy.random import RandomState

from policylab.data.rollout import Completion
from policylab.errors import UserError
from policylab.rewards.optimality import optimality
from policylab.tasks.base import Task
from policylab.tasks.random_walks import RandomWalks, draw_graph, draw_walk, shortest_lengths

DEFAULTS: dict[str, Any] = {
    "name": "random_walks",
    "nodes": 21,
    "p_edge": 0.1,
    "walks": 1000,
    "max_length": 10,
    "held_out": 256,
    "seed": 1002,
}


@pytest.fixture(scope="module")
def task() -> RandomWalks:
    return RandomWalks(**DEFAULTS)


def finished(task: Task, text: str) -> Completion:
    """A walk as a completion of the policy."""
    references = {example.text: example.reference for example in task.train}
    return Completion(text[0], text[1:], references[text[0]], tokens=(1,), ended=True)


def test_the_walks_are_those_of_trlx(task: RandomWalks):
    walks = [example.text + example.completion for example in task.train]
    assert len(walks) == 1000
    assert walks[:6] == ["oseotba", "qka", "jrmhnba", "cua", "qkinba", "rmhnba"]
    assert all(len(example.text) == 1 for example in task.train)


def test_the_graph_is_that_of_trlx(task: RandomWalks):
    reference = task.train[0].reference
    assert sum(len(ends) for ends in reference["edges"].values()) == 43
    assert reference["edges"]["a"] == "a"  # the goal leads only to itself
    shortest = {example.text: example.reference["shortest"] for example in task.train}
    assert [shortest[node] for node in "bcdefghijklmnopqrstu"] == [
        *(2, 3, 3, 5, 5, 3, 4, 4, 4, 2),
        *(3, 5, 3, 4, 4, 3, 5, 4, 3, 2),
    ]


@pytest.mark.parametrize(
    ("walk", "expected"),
    [
        ("ba", 1.0),
        ("qka", 1.0),
        ("oseotba", 0.5),  # (10 - 7) / (10 - 4)
        ("jrmhnba", 0.5),
        ("b", 0.0),  # does not arrive
        ("bca", 0.0),  # no edge from b to c
        ("b?a", 0.0),
        ("ca", 0.0),
    ],
)
def test_scores_are_those_of_trlx(task: RandomWalks, walk: str, expected: float):
    assert optimality([finished(task, walk)])[0].total == pytest.approx(expected)


def test_a_random_policy_scores_079(task: RandomWalks):
    """The walks are those of a policy that takes random edges; trlX's code scores them 0.79018 too."""
    metrics = task.metrics([finished(task, e.text + e.completion) for e in task.train])
    assert metrics.keys() == {"optimality", "valid", "reached"}
    means = {name: sum(values) / 1000 for name, values in metrics.items()}
    assert means == pytest.approx({"optimality": 0.79018, "valid": 1.0, "reached": 0.985}, abs=1e-5)


def test_validation_cycles_through_the_start_nodes(task: RandomWalks):
    starts = [example.text for example in task.val]
    assert starts[:21] == [*"bcdefghijklmnopqrstu", "b"]
    assert set(Counter(starts).values()) == {12, 13}
    assert len(starts) == 256


def test_shortest_lengths_by_hand():
    # 1 -> 0; 2 -> 1; 3 -> 2 and 3 -> 0; 4 -> 4 leads nowhere
    neighbours = [[0], [0], [1], [2, 0], [4]]
    assert shortest_lengths(neighbours, max_length=10) == [1, 2, 3, 2, 10]
    assert shortest_lengths(neighbours, max_length=3) == [1, 2, 3, 2, 3]


def test_another_seed_is_another_graph_and_the_same_seed_the_same():
    walks = [
        [(e.text, e.completion) for e in RandomWalks(**{**DEFAULTS, "seed": seed}).train]
        for seed in (0, 0, 1)
    ]
    assert walks[0] == walks[1] != walks[2]


def test_every_graph_has_a_way_to_its_goal():
    """For 30 of 300 seeds, one of them 42, the goal of the first graph cannot be reached."""
    task = RandomWalks(**{**DEFAULTS, "seed": 42})
    assert min(example.reference["shortest"] for example in task.train) == 2
    assert max(task.metrics([finished(task, e.text + e.completion) for e in task.train])["optimality"]) == 1.0
    for seed in range(300):
        assert [0] in [ends[:1] for ends in draw_graph(RandomState(seed), 21, 0.1)[1:]]


def test_a_walk_stops_at_the_goal_or_at_its_maximum_length():
    random = RandomState(0)
    neighbours = draw_graph(random, nodes=8, p_edge=0.3)
    for walk in (draw_walk(random, neighbours, max_length=5) for _ in range(50)):
        assert walk[0] != 0
        assert walk[-1] == 0 or len(walk) == 5
        assert 0 not in walk[:-1]
        assert all(after in neighbours[node] for node, after in pairwise(walk))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"nodes": 27}, "task.nodes is 27; it must be at least 2 and at most 26"),
        ({"nodes": 1}, "task.nodes is 1"),
        ({"walks": 0}, "task.walks is 0; it must be at least 1"),
        ({"max_length": 2}, "task.max_length is 2; it must be at least 3"),
        ({"walks": 1, "max_length": 3, "seed": 2}, "no walk can get a reward: from none of the starts"),
        ({"held_out": 0}, "task.held_out is 0"),
        ({"p_edge": 1.5}, "task.p_edge is 1.5"),
        ({"p_edge": 0.001}, "no graph of 21 nodes .* and one into the goal at task.p_edge=0.001"),
        ({"seed": -1}, "task.seed is -1"),
    ],
)
def test_refuses(wrong: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        RandomWalks(**(DEFAULTS | wrong))
