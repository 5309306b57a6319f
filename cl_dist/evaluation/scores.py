"""Comparing a predicted text with its reference, and scores of whole tasks: macro-F1 and joint goal accuracy.

Texts that look the same to a reader are equal here: all are compared in Unicode's normal form C.
"""

from __future__ import annotations

import string
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING

from cl_dist.config.schema import EvalConfig
from cl_dist.evaluation.rouge_tokens import rouge_tokenizer
from cl_dist.tasks.types import Slot, compose

if TYPE_CHECKING:
    from rouge_score.rouge_scorer import RougeScorer

Score = Callable[[str, str], float]
"""(prediction, reference) -> a score between 0 and 1."""
Normaliser = Callable[[str], str]
"""Texts with the same result count as the same answer."""

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, with white space stripped and collapsed to single spaces."""
    return compose(" ".join(text.casefold().split()))


def normalise_without_punctuation(text: str) -> str:
    """Lower case without ASCII punctuation, white space as in `normalise`.

    This is `normalize_answer` of the scorer shared by O-LoRA, MIGU and Super-NaturalInstructions (adapted from
    SQuAD's), which lower-cases first.
    """
    return compose(" ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split()))


NORMALISERS: dict[str, Normaliser] = {"none": normalise, "punctuation": normalise_without_punctuation}
"""By `eval.normalise`."""


def exact_match(prediction: str, reference: str, normaliser: Normaliser = normalise) -> float:
    """1.0 if the texts are equal, else 0.0; by default up to case and leading, trailing and repeated white space."""
    return float(normaliser(prediction) == normaliser(reference))


def rouge_l(prediction: str, reference: str, tokenizer: str = "default", path: str | None = None) -> float:
    """ROUGE-L F1 of the two texts (Lin 2004).

    The default tokenizer applies Porter stemming, like the scorer of the SuperNI benchmark; `tokenizer` and `path` are
    `eval.rouge_tokenizer` and `eval.rouge_tokenizer_path`.
    """
    scorer = _rouge_scorer(tokenizer, path)
    return float(scorer.score(target=compose(reference), prediction=compose(prediction))["rougeL"].fmeasure)


def macro_f1(pairs: Sequence[tuple[str, str]], labels: Collection[str], normaliser: Normaliser = normalise) -> float:
    """Mean F1 of the classes that occur, each 2 TP / (2 TP + FP + FN).

    Args:
        pairs: Prediction and reference of each sample, compared as in `exact_match`.
        labels: The task's labels. Any other prediction misses its reference, but is not a class itself; if all
            predictions are labels, this is scikit-learn's `f1_score(average="macro")`.
        normaliser: Applied to texts before they are compared.

    Raises:
        ValueError: There are no samples.
    """
    known = {normaliser(label) for label in labels} | {normaliser(reference) for _, reference in pairs}
    found = [(normaliser(prediction), normaliser(reference)) for prediction, reference in pairs]
    predicted = Counter(prediction for prediction, _ in found if prediction in known)
    expected = Counter(reference for _, reference in found)
    hit = Counter(reference for prediction, reference in found if prediction == reference)
    classes = predicted.keys() | expected.keys()
    if not classes:
        raise ValueError("no sample: there is nothing to take the F1 of")
    return sum(2 * hit[each] / (predicted[each] + expected[each]) for each in sorted(classes)) / len(classes)


def slot_match(prediction: str, reference: str) -> float:
    """1.0 if the prediction, stripped and in lower case, equals the reference exactly, else 0.0.

    The reference is not lower-cased, so one with capitals can never match (the benchmark has none).
    """
    return float(compose(prediction.strip().lower()) == compose(reference))


def joint_goal_accuracy(outcomes: Iterable[tuple[Slot, bool]]) -> float:
    """Share of dialogue turns with all slots right, as TaSL's public script `eval_avgJGA.py` counts them.

    Args:
        outcomes: Each sample's slot, and whether the prediction is right. If a slot of a turn occurs more than once,
            the last sample counts.

    Raises:
        ValueError: There are no samples.
    """
    turns: dict[str, dict[str, bool]] = defaultdict(dict)
    for slot, right in outcomes:
        turns[slot.turn][slot.name] = right
    if not turns:
        raise ValueError("no sample: there is no turn to be right")
    return sum(all(slots.values()) for slots in turns.values()) / len(turns)


@cache
def _rouge_scorer(tokenizer: str, path: str | None) -> RougeScorer:
    from rouge_score.rouge_scorer import RougeScorer  # brings nltk, scipy, scikit-learn and pandas along

    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=rouge_tokenizer(tokenizer, path))


SCORES: dict[str, Score] = {"exact_match": exact_match, "macro_f1": exact_match, "rouge_l": rouge_l, "jga": slot_match}
"""The score of a sample by metric, with default settings."""


@dataclass(frozen=True)
class Comparison:
    """How a task's answers are compared with their references."""

    metric: str
    score: Score
    normaliser: Normaliser

    @property
    def exact(self) -> bool:
        """Whether every sample is either right or wrong."""
        return self.metric in ("exact_match", "macro_f1")


def comparison(metric: str, config: EvalConfig) -> Comparison:
    """The comparison for a metric under these settings."""
    normaliser = NORMALISERS[config.normalise]
    score = SCORES[metric]
    if metric in ("exact_match", "macro_f1"):
        score = partial(exact_match, normaliser=normaliser)
    elif metric == "rouge_l":
        score = partial(rouge_l, tokenizer=config.rouge_tokenizer, path=config.rouge_tokenizer_path)
    return Comparison(metric, score, normaliser)
