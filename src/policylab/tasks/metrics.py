"""Metrics of texts that no reward here optimises."""

from __future__ import annotations

from itertools import pairwise


def polarity(text: str) -> float:
    """TextBlob's polarity, -1 to 1: a second opinion on sentiment, by another lexicon than VADER's.

    A policy that learned sentiment raises both; one that learned VADER's favourite words raises VADER alone.
    """
    # slow to import (it brings nltk), and only reviews need it
    from textblob.en import sentiment

    return float(sentiment(text)[0])


def distinct_2(text: str) -> float:
    """Share of distinct ones among a text's word pairs (Li et al., arXiv:1510.03055); 1 if nothing repeats.

    >>> distinct_2("so good so good so good")
    0.4
    """
    pairs = list(pairwise(text.split()))
    return len(set(pairs)) / len(pairs) if pairs else 1.0
