"""Metrics of texts that no reward here optimizes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from itertools import pairwise


def polarity(text: str) -> float:
    """TextBlob's polarity, -1 to 1: sentiment by another lexicon than VADER's.

    A policy that learned sentiment raises both scores; one that learned words of VADER's lexicon raises only VADER's.
    """
    return float(_lexicon()(text)[0])


@cache
def _lexicon() -> Callable[[str], tuple[float, float]]:
    """TextBlob's sentiment without its package, whose ``__init__`` imports nltk and scipy: 1.1 s of every run."""
    spec = None if "textblob" in sys.modules else find_spec("textblob")
    if spec is not None:
        sys.modules["textblob"] = module_from_spec(spec)  # its __init__ is not executed
    try:
        return import_module("textblob.en").sentiment
    finally:
        if spec is not None:
            del sys.modules["textblob"]


def distinct_2(text: str) -> float:
    """Share of distinct pairs among a text's word pairs (Li et al., arXiv:1510.03055); 1 if none is repeated.

    >>> distinct_2("so good so good so good")
    0.4
    """
    pairs = list(pairwise(text.split()))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
