"""Scores of one predicted text against its reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from rouge_score.rouge_scorer import RougeScorer

Score = Callable[[str, str], float]
"""(prediction, reference) -> a number between 0 and 1."""


def exact_match(prediction: str, reference: str) -> float:
    """1.0 where the texts are equal up to case and white space (leading, trailing, repeated), else 0.0."""
    return float(normalise(prediction) == normalise(reference))


def rouge_l(prediction: str, reference: str) -> float:
    """ROUGE-L F1 of the two texts (Lin 2004), with Porter stemming as the SuperNI benchmark's own scorer does."""
    return float(_rouge_scorer().score(target=reference, prediction=prediction)["rougeL"].fmeasure)


def normalise(text: str) -> str:
    """Lower case, white space collapsed to single blanks, none at the ends."""
    return " ".join(text.casefold().split())


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


SCORES: dict[str, Score] = {"exact_match": exact_match, "rouge_l": rouge_l}
