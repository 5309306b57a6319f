"""Scores of one predicted text against its reference, and macro-F1 of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Sequence
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


def macro_f1(pairs: Sequence[tuple[str, str]], labels: Collection[str]) -> float:
    """Mean of the F1 of the classes that occur: 2 TP / (2 TP + FP + FN) each.

    Args:
        pairs: Prediction and reference of each sample, compared as `exact_match` does.
        labels: The task's. A predicted text that is none of them misses its reference and is no class of its own; for
            predicted labels this is scikit-learn's `f1_score(average="macro")`.

    Raises:
        ValueError: There is no sample.
    """
    known = {normalise(label) for label in labels} | {normalise(reference) for _, reference in pairs}
    found = [(normalise(prediction), normalise(reference)) for prediction, reference in pairs]
    predicted = Counter(prediction for prediction, _ in found if prediction in known)
    expected = Counter(reference for _, reference in found)
    hit = Counter(reference for prediction, reference in found if prediction == reference)
    classes = predicted.keys() | expected.keys()
    if not classes:
        raise ValueError("no sample: there is nothing to take the F1 of")
    return sum(2 * hit[each] / (predicted[each] + expected[each]) for each in sorted(classes)) / len(classes)


@cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


SCORES: dict[str, Score] = {"exact_match": exact_match, "macro_f1": exact_match, "rouge_l": rouge_l}
"""Score of a sample, by the metric of its task."""
