"""Scores of one predicted text against its reference, and macro-F1 of many.

Texts that are the same to a reader are the same here: all are compared in Unicode's normal form C.
"""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache, partial

from rouge_score.rouge_scorer import RougeScorer

from cl_dist.config.schema import EvalConfig
from cl_dist.evaluation.jga import slot_match
from cl_dist.evaluation.rouge_tokens import rouge_tokenizer
from cl_dist.tasks.types import compose

Score = Callable[[str, str], float]
"""(prediction, reference) -> a number between 0 and 1."""
Normaliser = Callable[[str], str]
"""Texts that it makes equal are one answer."""

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, white space collapsed to single blanks, none at the ends."""
    return compose(" ".join(text.casefold().split()))


def normalise_without_punctuation(text: str) -> str:
    """Lower case without ASCII punctuation, white space as in `normalise`: `normalize_answer` of the scorer that
    O-LoRA, MIGU and Super-NaturalInstructions share (adapted there from SQuAD's), which lower-cases first.
    """
    return compose(" ".join(text.lower().translate(_WITHOUT_PUNCTUATION).split()))


NORMALISERS: dict[str, Normaliser] = {"none": normalise, "punctuation": normalise_without_punctuation}
"""By `eval.normalise`."""


def exact_match(prediction: str, reference: str, normaliser: Normaliser = normalise) -> float:
    """1.0 where the texts are equal up to case and white space (leading, trailing, repeated), or up to what another
    normaliser leaves out of account, else 0.0.
    """
    return float(normaliser(prediction) == normaliser(reference))


def rouge_l(prediction: str, reference: str, tokenizer: str = "default", path: str | None = None) -> float:
    """ROUGE-L F1 of the two texts (Lin 2004). The default tokenizer stems (Porter), as the SuperNI benchmark's own
    scorer does; `tokenizer` and `path` are `eval.rouge_tokenizer` and `eval.rouge_tokenizer_path`.
    """
    scorer = _rouge_scorer(tokenizer, path)
    return float(scorer.score(target=compose(reference), prediction=compose(prediction))["rougeL"].fmeasure)


def macro_f1(pairs: Sequence[tuple[str, str]], labels: Collection[str], normaliser: Normaliser = normalise) -> float:
    """Mean of the F1 of the classes that occur: 2 TP / (2 TP + FP + FN) each.

    Args:
        pairs: Prediction and reference of each sample, compared as `exact_match` does.
        labels: The task's. A predicted text that is none of them misses its reference and is no class of its own; for
            predicted labels this is scikit-learn's `f1_score(average="macro")`.
        normaliser: What makes texts equal.

    Raises:
        ValueError: There is no sample.
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


@cache
def _rouge_scorer(tokenizer: str, path: str | None) -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True, tokenizer=rouge_tokenizer(tokenizer, path))


SCORES: dict[str, Score] = {"exact_match": exact_match, "macro_f1": exact_match, "rouge_l": rouge_l, "jga": slot_match}
"""Score of a sample, by the metric of its task, as the default settings have it."""


@dataclass(frozen=True)
class Comparison:
    """How the answers of one task are compared with their references."""

    metric: str
    score: Score
    normaliser: Normaliser

    @property
    def exact(self) -> bool:
        """Whether a sample is either right or wrong."""
        return self.metric in ("exact_match", "macro_f1")


def comparison(metric: str, config: EvalConfig) -> Comparison:
    """How the settings compare answers under a metric."""
    normaliser = NORMALISERS[config.normalise]
    score = SCORES[metric]
    if metric in ("exact_match", "macro_f1"):
        score = partial(exact_match, normaliser=normaliser)
    elif metric == "rouge_l":
        score = partial(rouge_l, tokenizer=config.rouge_tokenizer, path=config.rouge_tokenizer_path)
    return Comparison(metric, score, normaliser)
