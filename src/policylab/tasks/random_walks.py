"""The random-walks toy task of trlX: walk through a random graph to its goal in as few steps as possible.

A directed graph of 21 nodes (letters), and 1,000 random walks on it as text: does a policy trained on them learn to
take the shortest ones? Source: the random-walks example of trlX (Havrilla
et al., EMNLP 2023), after Chen et al., Decision Transformer, arXiv:2106.01345. The same seed gives the same
graph, walks and scores as there (if its goal can be reached), because numpy's legacy ``RandomState`` draws the same
numbers in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from string import ascii_lowercase

import numpy as np
from numpy.random import RandomState

from policylab.data.rollout import Completion
from policylab.errors import UserError, check_range
from policylab.rewards.base import score
from policylab.rewards.optimality import Map, optimality
from policylab.tasks.base import Example

GOAL = 0  # the node whose letter is "a"
DRAWS = 10_000  # largest number of graphs drawn, until every node leads somewhere and one leads to the goal

Neighbours = list[list[int]]  # node -> the nodes that it leads to


class RandomWalks:
    """Start nodes as prompts, the rest of a walk as completion (see ``tasks.base.Task``).

    Args:
        name: names the run.
        nodes: of the graph, the goal included; 2 to 26.
        p_edge: probability that one node leads to another.
        walks: random walks to train on.
        max_length: largest number of nodes in a walk, its start included; with 2, every walk that arrives would be a
            shortest one.
        held_out: walks for validation; their starts cycle through the start nodes in alphabetical order.
        seed: of graph and walks, apart from the run's seed, so that all runs solve the same problem.

    Raises:
        UserError: when an argument is out of range, no graph is found, or the goal cannot be reached from the start of
            any walk.
    """

    instruction = None

    def __init__(
        self, name: str, nodes: int, p_edge: float, walks: int, max_length: int, held_out: int, seed: int
    ) -> None:
        check_range("task.nodes", nodes, 2, len(ascii_lowercase))
        check_range("task.walks", walks, 1)
        check_range("task.max_length", max_length, 3)
        check_range("task.held_out", held_out, 1)
        check_range("task.p_edge", p_edge, 0, 1)
        check_range("task.seed", seed, 0, 2**32 - 1)
        self.name = name
        random = RandomState(seed)
        neighbours = draw_graph(random, nodes, p_edge)
        texts = [_letters(draw_walk(random, neighbours, max_length)) for _ in range(walks)]
        maps = maps_from(neighbours, max_length)
        starts = sorted({text[0] for text in texts})
        if all(maps[start]["shortest"] == max_length for start in starts):
            raise UserError(
                f"no walk can get a reward: from none of the starts {', '.join(starts)} of task.walks={walks} walks is "
                f"the goal fewer than task.max_length={max_length} nodes away; raise either, or take another task.seed"
            )
        self.train = [Example(text[0], text[1:], maps[text[0]]) for text in texts]
        # Held-out walks, for the loss of supervised training; drawn last, so that everything before equals trlX.
        nodes_held_out = [ascii_lowercase.index(start) for start in np.resize(starts, held_out).tolist()]
        held = [_letters(draw_walk_from(node, random, neighbours, max_length)) for node in nodes_held_out]
        self.val = [Example(text[0], text[1:], maps[text[0]]) for text in held]

    def metrics(self, completions: Sequence[Completion]) -> Mapping[str, Sequence[float]]:
        """The score itself, the share of walks that follow the edges, and the share that arrive."""
        scores = score(optimality, completions)
        return {"optimality": scores.total, **scores.parts}


def draw_graph(random: RandomState, nodes: int, p_edge: float) -> Neighbours:
    """A random directed graph in which every node leads somewhere, and the goal only to itself.

    It is drawn again until a node leads to the goal, because otherwise no walk would have a reward. trlX does not draw
    again; all other graphs are the same as in trlX.
    """
    for _ in range(DRAWS):
        edges = random.rand(nodes, nodes) > 1 - p_edge
        np.fill_diagonal(edges, False)
        if edges.any(axis=1).all() and edges[:, GOAL].any():
            edges[GOAL] = np.arange(nodes) == GOAL
            return [np.flatnonzero(row).tolist() for row in edges]
    raise UserError(
        f"found no graph of {nodes} nodes with an edge out of each node and one into the goal at task.p_edge={p_edge}; "
        "raise task.p_edge"
    )


def draw_walk(random: RandomState, neighbours: Neighbours, max_length: int) -> list[int]:
    """A random walk that starts anywhere but at the goal, and stops there."""
    node = GOAL
    while node == GOAL:
        node = random.randint(len(neighbours))
    return draw_walk_from(node, random, neighbours, max_length)


def draw_walk_from(node: int, random: RandomState, neighbours: Neighbours, max_length: int) -> list[int]:
    """The same from a given node."""
    walk = [node]
    while node != GOAL and len(walk) < max_length:
        node = int(random.choice(neighbours[node]))
        walk.append(node)
    return walk


def maps_from(neighbours: Neighbours, max_length: int) -> dict[str, Map]:
    """The data for scoring a walk, for each start; all share one table of edges."""
    edges = {_letters([node]): _letters(ends) for node, ends in enumerate(neighbours)}
    lengths = shortest_lengths(neighbours, max_length)
    return {
        letter: Map(edges=edges, goal=ascii_lowercase[GOAL], shortest=length, max_length=max_length)
        for letter, length in zip(edges, lengths, strict=True)
    }


def shortest_lengths(neighbours: Neighbours, max_length: int) -> list[int]:
    """Number of nodes on the shortest walk from each node to the goal; ``max_length`` if there is no shorter one."""
    lengths = {GOAL: 1}
    for length in range(2, max_length):
        lengths |= {
            node: length
            for node, ends in enumerate(neighbours)
            if node not in lengths and not lengths.keys().isdisjoint(ends)
        }
    return [lengths.get(node, max_length) for node in range(len(neighbours))]


def _letters(nodes: Sequence[int]) -> str:
    return "".join(ascii_lowercase[node] for node in nodes)
