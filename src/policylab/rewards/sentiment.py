"""Sentiment of the completion, by VADER's lexicon and rules."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from policylab.data.text import Completion
from policylab.rewards.base import Score


@cache
def _analyzer() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()  # reads its lexicon


def sentiment(completions: Sequence[Completion]) -> list[Score]:
    """VADER's compound score of the completion alone: -1 (most negative) to 1 (most positive), 0 if neutral.

    Parts: ``positive`` and ``negative``, the shares (0 to 1) of positive and negative text; a text with both can have
    the same total as a text with neither.

    Source: Hutto & Gilbert, VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social Media
    Text, ICWSM 2014.
    """
    return [_score(completion.text) for completion in completions]


def _score(text: str) -> Score:
    polarity = _analyzer().polarity_scores(text)
    return Score(polarity["compound"], {"positive": polarity["pos"], "negative": polarity["neg"]})
