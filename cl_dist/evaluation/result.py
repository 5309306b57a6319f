"""What evaluating a task gives, and how the predictions are written out."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cl_dist.config.objectives import Mode as Mode
from cl_dist.state.atomic import make_folder, replacing

CUT_GENERATIONS = "cut_generations"
"""Name of the number of answers that `eval.max_new_tokens` has ended."""


@dataclass(frozen=True)
class Prediction:
    """One sample's outcome."""

    index: int
    """Position of the sample in the task's evaluation split; of the chunk in its text for perplexity."""
    prediction: str
    """The chosen label or the generated text; empty for perplexity."""
    reference: str
    """The expected answer, of several the one that the prediction comes closest to; empty for perplexity, whose
    reference is the text itself.
    """
    score: float
    """Score of this sample, higher is better. Perplexity: mean log-likelihood of a target token, in nats."""
    weight: int = 1
    """Weight of this sample in the task's score. Perplexity: number of target tokens."""
    cut: bool = False
    """Whether the answer was generated and ended by `eval.max_new_tokens`."""


@dataclass(frozen=True)
class TaskScore:
    """One task's evaluation, the same on every rank and for any number of ranks (but for `predictions`)."""

    task: str
    mode: Mode
    metric: str
    """`exact_match`, `macro_f1`, `rouge_l`, `jga` or `log_likelihood`."""
    score: float
    """Weighted mean of the samples' scores, macro-F1 or joint goal accuracy; higher is better: the entry of the
    accuracy matrix.
    """
    count: int
    """Number of samples."""
    predictions: list[Prediction] = field(default_factory=list)
    """In file order on rank 0, empty on the other ranks."""
    extras: dict[str, float] = field(default_factory=dict)
    """Further numbers by name: `perplexity` where the metric is `log_likelihood`; of a task with labels the one of
    `exact_match` and `macro_f1` that is not the metric; `slot_accuracy` where it is `jga`; `cut_generations` of
    generated answers.
    """


def weighted_mean(predictions: Iterable[Prediction]) -> float:
    """Mean of the scores by weight; raises ValueError where no sample has any weight."""
    total, weights = 0.0, 0
    for prediction in predictions:
        total += prediction.score * prediction.weight
        weights += prediction.weight
    if weights == 0:
        raise ValueError("no prediction has a weight: there is nothing to take the mean of")
    return total / weights


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Replace the file `path`, durably, by one JSON object a line with the fields of `Prediction`; folders above it are
    made. `DiskFull` where the disk is full.
    """
    make_folder(path.parent)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
