"""How short a walk to the goal is, compared with the shortest one; for ``task=random_walks``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypedDict

from policylab.data.text import Completion
from policylab.errors import UserError
from policylab.rewards.base import Score


class Map(TypedDict):
    """The task's ``reference``; lengths count nodes, the first and the goal included."""

    edges: dict[str, str]  #: node -> the nodes that it leads to, one letter each
    goal: str
    shortest: int  #: length of the shortest walk from the prompt's node; ``max_length`` if there is none
    max_length: int  #: a walk that has not reached the goal by then does not arrive


@dataclass(frozen=True)
class Walk:
    """A parsed walk, up to its first arrival at the goal."""

    nodes: str
    valid: bool  #: every step follows an edge
    reached: bool  #: valid, and ends in the goal within the maximum length


def read_walk(text: str, here: Map) -> Walk:
    """Parses a walk, one letter for each node; text after the goal is ignored.

    >>> here = Map(edges={"a": "a", "b": "ac", "c": "b"}, goal="a", shortest=2, max_length=4)
    >>> read_walk("baccc", here)
    Walk(nodes='ba', valid=True, reached=True)
    """
    end = text.find(here["goal"])
    nodes = text[: end + 1] if end >= 0 else text
    edges = here["edges"]
    valid = nodes[:1] in edges and all(after in edges.get(node, "") for node, after in pairwise(nodes))
    return Walk(nodes, valid, reached=valid and 0 <= end < here["max_length"])


def optimality(completions: Sequence[Completion]) -> list[Score]:
    """1 for a shortest walk to the goal, falling in equal steps to 0 at the maximum length.

    ``(max_length - length) / (max_length - shortest)``; 0 for a walk that steps where there is no edge, or
    does not arrive. Parts: ``valid`` and ``reached``, 0 or 1 each.

    Source: the random-walks example of trlX (Havrilla et al., EMNLP 2023), after Chen et al., Decision
    Transformer, arXiv:2106.01345, section 1. Its formula goes below 0 for walks beyond the maximum length,
    which its own sampler cannot produce; here they are 0.

    Raises:
        UserError: when a completion has no map, as with another task.
    """
    return [_score(completion) for completion in completions]


def _score(completion: Completion) -> Score:
    here: Map = completion.reference
    if not isinstance(here, dict) or not here.keys() >= Map.__required_keys__:
        raise UserError(
            f"reward=optimality found no map with the prompt {completion.prompt!r:.60}; "
            f"it goes with task=random_walks"
        )
    walk = read_walk(completion.prompt + completion.text, here)
    total = 0.0
    if walk.reached and here["max_length"] > here["shortest"]:
        total = (here["max_length"] - len(walk.nodes)) / (here["max_length"] - here["shortest"])
    return Score(total, {"valid": float(walk.valid), "reached": float(walk.reached)})
