"""Continual-learning metrics: plain arithmetic on the accuracy matrix.

The matrix of a stream of T tasks has T+1 rows of T scores. Row 0 is from before training, row i+1 from after training
on task i; column j is task j. An entry that was not evaluated is None. The formulas write `a[i][j]` for the score on
task j after training on task i, and `a[-1]` for the row before training. Published definitions disagree, so each
variant has its own name. A metric is None if one of its inputs is missing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

UNTOUCHED = "untouched"
"""Name for the point in the stream before any training."""

Row = Sequence[float | None]
Matrix = Sequence[Row]


def all_metrics(matrix: Matrix, single: Sequence[float] | None = None) -> dict[str, float | None]:
    """All metrics by name.

    `matrix` has T+1 rows of T scores, higher is better; `single` has the scores of T models that were each trained on a
    single task. Raises ValueError if the shapes do not match.
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
    """AP: mean of the last row, `mean_j a[T-1][j]` (all papers in the field)."""
    return _mean(matrix[-1])


def average_performance_by_metric(
    matrix: Matrix, tasks: Sequence[str], scored_by: Mapping[str, str]
) -> dict[str, float | None]:
    """AP over the tasks of each kind of score alone. `scored_by`: the kind by task; tasks without one are left out."""
    kinds = dict.fromkeys(scored_by[task] for task in tasks if task in scored_by)
    last = dict(zip(tasks, matrix[-1], strict=True))
    return {kind: _mean(last[task] for task in tasks if scored_by.get(task) == kind) for kind in kinds}


def backward_transfer(matrix: Matrix) -> float | None:
    """BWT: `1/(T-1) sum_{j<T-1} (a[T-1][j] - a[j][j])` (GEM, TaSL, Recurrent-KIF)."""
    return _mean(_backward_differences(matrix))


def backward_transfer_over_tasks(matrix: Matrix) -> float | None:
    """BWT divided by T instead of T-1 (SAPT)."""
    tasks = len(matrix) - 1
    mean = backward_transfer(matrix)
    return None if mean is None else mean * (tasks - 1) / tasks


def forgetting(matrix: Matrix) -> float | None:
    """F: `1/(T-1) sum_{j<T-1} (max_{i<T-1} a[i][j] - a[T-1][j])` (Chaudhry et al. 2018).

    Negative if scores improved. The maximum includes scores on task j from before it was trained, if there are any.
    """
    tasks = len(matrix) - 1
    return _mean(_difference(_best(matrix, j, last=tasks - 1), matrix[-1][j]) for j in range(tasks - 1))


def forgetting_with_last(matrix: Matrix) -> float | None:
    """F with the last row included in the maximum, as in several code bases; never negative."""
    tasks = len(matrix) - 1
    return _mean(_difference(_best(matrix, j, last=tasks), matrix[-1][j]) for j in range(tasks - 1))


def forward_transfer_zero_shot(matrix: Matrix) -> float | None:
    """FWT: `1/(T-1) sum_{j>=1} (a[j-1][j] - a[-1][j])`, the gain on a task before it is trained (GEM)."""
    return _mean(_difference(matrix[j][j], matrix[0][j]) for j in range(1, len(matrix) - 1))


def forward_transfer_absolute(matrix: Matrix) -> float | None:
    """FWT without a baseline: `1/(T-1) sum_{j>=1} a[j-1][j]`, the score on a task before it is trained (TaSL,
    eval_fwt.py of its code). It includes what the untouched model can do.
    """
    return _mean(matrix[j][j] for j in range(1, len(matrix) - 1))


def forward_transfer_single(matrix: Matrix, single: Sequence[float] | None) -> float | None:
    """FWT against single-task training: `mean_j (a[j][j] - single[j])` (SAPT); None without `single`."""
    if single is None:
        return None
    return _mean(_difference(matrix[j + 1][j], score) for j, score in enumerate(single))


def learning_accuracy(matrix: Matrix) -> float | None:
    """LA: `mean_j a[j][j]`, the score on each task right after training on it (MER, Riemer et al. 2019)."""
    return _mean(matrix[j + 1][j] for j in range(len(matrix) - 1))


def general_ability(measured: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> float | None:
    """Mean score on the general ability tasks after the last task of the stream.

    `measured` are the manifest's `general` entries, `tasks` the names of the stream's tasks.
    """
    return _mean(_general_scores(measured, tasks[-1]).values())


def general_forgetting(measured: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> float | None:
    """Mean drop of the general ability scores from before training to after the last task; negative if they improved.

    Compare it with `learning_accuracy`, which measures what was gained in exchange.
    """
    before, after = _general_scores(measured, UNTOUCHED), _general_scores(measured, tasks[-1])
    return _mean(_difference(before.get(name), after.get(name)) for name in {**before, **after})


def _general_scores(measured: Sequence[Mapping[str, Any]], place: str) -> dict[str, float]:
    """Scores by harness task, measured after `place`; empty if nothing was measured there."""
    entries = [entry["scores"] for entry in measured if entry["after"] == place]
    return {name: float(values["score"]) for name, values in entries[-1].items()} if entries else {}


def _backward_differences(matrix: Matrix) -> list[float | None]:
    """`a[T-1][j] - a[j][j]` for every task but the last."""
    return [_difference(matrix[-1][j], matrix[j + 1][j]) for j in range(len(matrix) - 2)]


def _best(matrix: Matrix, task: int, last: int) -> float | None:
    """Best score on `task` after training on tasks 0 to last-1; None if one since its own training is missing."""
    scores = [row[task] for row in matrix[1 : last + 1]]
    if any(score is None for score in scores[task:]):
        return None
    return max((score for score in scores if score is not None), default=None)


def _difference(first: float | None, second: float | None) -> float | None:
    """First minus second; None if either is None."""
    return None if first is None or second is None else first - second


def _mean(values: Iterable[float | None]) -> float | None:
    """Arithmetic mean; None if there are no values or one of them is None."""
    present = list(values)
    known = [value for value in present if value is not None]
    if not known or len(known) < len(present):
        return None
    return sum(known) / len(known)


def _check_shape(matrix: Matrix, single: Sequence[float] | None) -> None:
    """Raise ValueError unless the matrix is (T+1, T) with T >= 1 and `single`, if given, has T scores."""
    tasks = len(matrix) - 1
    if tasks < 1 or any(len(row) != tasks for row in matrix):
        raise ValueError(
            f"an accuracy matrix has T+1 rows of T scores; this one has rows of {[len(r) for r in matrix]}"
        )
    if single is not None and len(single) != tasks:
        raise ValueError(f"{len(single)} single-task scores for {tasks} tasks")
