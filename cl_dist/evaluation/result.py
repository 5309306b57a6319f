"""The result of evaluating a task, and how predictions are written to a file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from cl_dist.config.objectives import Mode as Mode
from cl_dist.state.atomic import make_folder, replacing
from cl_dist.state.manifest import CUT_GENERATIONS as CUT_GENERATIONS


@dataclass(frozen=True)
class Prediction:
    """The result for one sample."""

    index: int
    """Position of the sample in the task's evaluation split. Perplexity: of the chunk in the text."""
    prediction: str
    """The chosen label or the generated text; empty for perplexity."""
    reference: str
    """The expected answer; if there are several, the one closest to the prediction. Empty for perplexity, whose
    reference is the text itself."""
    score: float
    """Score of this sample, higher is better. Perplexity: mean log-likelihood per target token, in nats."""
    weight: int = 1
    """Weight of this sample in the task's score. Perplexity: number of target tokens."""
    cut: bool = False
    """Whether the answer was generated and cut at `eval.max_new_tokens`."""


@dataclass(frozen=True)
class TaskScore:
    """The result for one task. Except for `predictions`, it is the same on every rank and for any number of ranks."""

    task: str
    mode: Mode
    metric: str
    """`exact_match`, `macro_f1`, `rouge_l`, `jga` or `log_likelihood`."""
    score: float
    """The entry in the accuracy matrix: weighted mean of the samples' scores, macro-F1 or joint goal accuracy. Higher
    is better."""
    count: int
    """Number of samples."""
    predictions: list[Prediction] = field(default_factory=list)
    """In file order on rank 0, empty on the other ranks."""
    extras: dict[str, float] = field(default_factory=dict)
    """Further numbers by name: `perplexity` if the metric is `log_likelihood`; for a task with labels, whichever of
    `exact_match` and `macro_f1` is not the metric; `slot_accuracy` if it is `jga`; `cut_generations` for generated
    answers."""


def weighted_mean(predictions: Iterable[Prediction]) -> float:
    """Weighted mean of the scores. Raises ValueError if the total weight is zero."""
    total, weights = 0.0, 0
    for prediction in predictions:
        total += prediction.score * prediction.weight
        weights += prediction.weight
    if weights == 0:
        raise ValueError("no prediction has a weight: there is nothing to take the mean of")
    return total / weights


def write_predictions(path: Path, predictions: Iterable[Prediction]) -> None:
    """Replace the content of `path`, durably, with one JSON object per line that has the fields of `Prediction`.

    Makes missing parent folders. Raises `DiskFull` if the disk is full.
    """
    make_folder(path.parent)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for prediction in predictions:
            file.write(json.dumps(asdict(prediction), ensure_ascii=False) + "\n")
