"""Continual-learning metrics: plain arithmetic on the accuracy matrix.

The matrix of a stream of T tasks has T+1 rows of T scores. Row 0 was taken before any training, row i+1 after training
on task i; column j is task j. An entry that was not evaluated is None. With `a[i][j]` the score on task j after
training on task i, and `a[-1]` the row before training, every metric is one function below. Published definitions
disagree, so each variant has its own name. A metric whose inputs are not all there is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNTOUCHED = "untouched"
"""Name of the place in the stream before any training."""

Row = Sequence[float | None]
Matrix = Sequence[Row]


def all_metrics(matrix: Matrix, single: Sequence[float] | None = None) -> dict[str, float | None]:
    """Every metric by its name.

    `matrix` has T+1 rows of T scores, higher is better; `single` holds the scores of T models that were each trained on
    one task alone. Raises ValueError where the shapes do not fit.
    """
    _check_shape(matrix, single)
    return {
        "average_performance": average_performance(matrix),
        "backward_transfer": backward_transfer(matrix),
        "backward_transfer_over_tasks": backward_transfer_over_tasks(matrix),
        "forgetting": forgetting(matrix),
        "forgetting_with_last": forgetting_with_last(matrix),
        "forward_transfer_zero_shot": forward_transfer_zero_shot(matrix),
        "forward_transfer_absolute": forward_transfer_absolute(matrix),
        "forward_transfer_single": forward_transfer_single(matrix, single),
        "learning_accuracy": learning_accuracy(matrix),
    }


def average_performance(matrix: Matrix) -> float | None:
    """AP: mean of the last row, `mean_j a[T-1][j]` (all papers of the field)."""
    return _mean(matrix[-1])


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT: `1/(T-1) sum_{j<T-1} (a[T-1][j] - a[j][j])` (GEM, TaSL, Recurrent-KIF)."""
    return _mean(_backward_differences(matrix))


def backward_transfer_over_tasks(matrix: Matrix) -> float | None:
    """BWT divided by T in place of T-1 (SAPT)."""
    tasks = len(matrix) - 1
    mean = backward_transfer(matrix)
    return None if mean is None else mean * (tasks - 1) / tasks


def forgetting(matrix: Matrix) -> float | None:
    """F: `1/(T-1) sum_{j<T-1} (max_{i<T-1} a[i][j] - a[T-1][j])` (Chaudhry et al. 2018).

    Negative where the tasks got better. Scores on task j from before it was trained take part in the maximum where they
    were evaluated.
    """
    tasks = len(matrix) - 1
    return _mean(_difference(_best(matrix, j, last=tasks - 1), matrix[-1][j]) for j in range(tasks - 1))


def forgetting_with_last(matrix: Matrix) -> float | None:
    """F with the last row inside the maximum (the variant of several code bases); never negative."""
    tasks = len(matrix) - 1
    return _mean(_difference(_best(matrix, j, last=tasks), matrix[-1][j]) for j in range(tasks - 1))


def forward_transfer_zero_shot(matrix: Matrix) -> float | None:
    """FWT: `1/(T-1) sum_{j>=1} (a[j-1][j] - a[-1][j])`, the gain on a task before it is trained (GEM)."""
    return _mean(_difference(matrix[j][j], matrix[0][j]) for j in range(1, len(matrix) - 1))


def forward_transfer_absolute(matrix: Matrix) -> float | None:
    """FWT with nothing subtracted: `1/(T-1) sum_{j>=1} a[j-1][j]`, the score itself on a task before it is trained
    (TaSL, eval_fwt.py of its code). A score, not a gain: what the untouched model can do counts too.
    """
    return _mean(matrix[j][j] for j in range(1, len(matrix) - 1))


def forward_transfer_single(matrix: Matrix, single: Sequence[float] | None) -> float | None:
    """FWT against single-task training: `mean_j (a[j][j] - single[j])` (SAPT); None without `single`."""
    if single is None:
        return None
    return _mean(_difference(matrix[j + 1][j], score) for j, score in enumerate(single))


def learning_accuracy(matrix: Matrix) -> float | None:
    """LA: `mean_j a[j][j]`, how well each task is learnt when it is its turn (MER, Riemer et al. 2019)."""
    return _mean(matrix[j + 1][j] for j in range(len(matrix) - 1))


def general_ability(measured: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> float | None:
    """Mean score on the tasks of general ability after the last task of the stream.

    `measured` are the manifest's `general` entries, `tasks` the stream's.
    """
    return _mean(_general_scores(measured, tasks[-1]).values())


def general_forgetting(measured: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> float | None:
    """Mean drop of the scores of general ability from before any training to after the last task.

    Beside it `learning_accuracy` says what was learnt in exchange. Negative where general ability has grown.
    """
    before, after = _general_scores(measured, UNTOUCHED), _general_scores(measured, tasks[-1])
    return _mean(_difference(before.get(name), after.get(name)) for name in {**before, **after})


def _general_scores(measured: Sequence[Mapping[str, Any]], place: str) -> dict[str, float]:
    """Score by task of the harness, measured after `place`; empty where it was not measured."""
    entries = [entry["scores"] for entry in measured if entry["after"] == place]
    return {name: float(values["score"]) for name, values in entries[-1].items()} if entries else {}


def _backward_differences(matrix: Matrix) -> list[float | None]:
    """`a[T-1][j] - a[j][j]` for every task but the last."""
    return [_difference(matrix[-1][j], matrix[j + 1][j]) for j in range(len(matrix) - 2)]


def _best(matrix: Matrix, task: int, last: int) -> float | None:
    """The best score on `task` after training on tasks 0 to last-1; None where one from its own on is missing."""
    scores = [row[task] for row in matrix[1 : last + 1]]
    if any(score is None for score in scores[task:]):
        return None
    return max((score for score in scores if score is not None), default=None)


def _difference(first: float | None, second: float | None) -> float | None:
    """First minus second; None where one of them is."""
    return None if first is None or second is None else first - second


def _mean(values: Iterable[float | None]) -> float | None:
    """Arithmetic mean; None where there is no value or one of them is None."""
    present = list(values)
    known = [value for value in present if value is not None]
    if not known or len(known) < len(present):
        return None
    return sum(known) / len(known)


def _check_shape(matrix: Matrix, single: Sequence[float] | None) -> None:
    """Raise ValueError unless the matrix is (T+1, T), T >= 1, and `single`, where given, has T scores."""
    tasks = len(matrix) - 1
    if tasks < 1 or any(len(row) != tasks for row in matrix):
        raise ValueError(
            f"an accuracy matrix has T+1 rows of T scores; this one has rows of {[len(r) for r in matrix]}"
        )
    if single is not None and len(single) != tasks:
        raise ValueError(f"{len(single)} single-task scores for {tasks} tasks")
