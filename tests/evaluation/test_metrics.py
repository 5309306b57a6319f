"""The metrics compared with values calculated by hand, and properties that hold for any matrix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.evaluation.metrics import all_metrics

# Rows: before training, after task 0, after task 1, after task 2.
HAND = [
    [0.1, 0.2, 0.3],
    [0.9, 0.25, 0.2],
    [0.7, 0.8, 0.5],
    [0.8, 0.5, 0.6],
]


def test_hand_computed() -> None:
    metrics = all_metrics(HAND, single=[0.95, 0.7, 0.8])
    expected = {
        "average_performance": (0.8 + 0.5 + 0.6) / 3,
        "backward_transfer": ((0.8 - 0.9) + (0.5 - 0.8)) / 2,
        "backward_transfer_over_tasks": ((0.8 - 0.9) + (0.5 - 0.8)) / 3,
        "forgetting": ((0.9 - 0.8) + (0.8 - 0.5)) / 2,
        "forgetting_with_last": ((0.9 - 0.8) + (0.8 - 0.5)) / 2,
        "forward_transfer_zero_shot": ((0.25 - 0.2) + (0.5 - 0.3)) / 2,
        "forward_transfer_absolute": (0.25 + 0.5) / 2,
        "forward_transfer_single": ((0.9 - 0.95) + (0.8 - 0.7) + (0.6 - 0.8)) / 3,
        "learning_accuracy": (0.9 + 0.8 + 0.6) / 3,
    }
    assert metrics == pytest.approx(expected)


def test_forgetting_variants_differ_where_the_last_row_is_best() -> None:
    matrix = [[0.0, 0.0], [0.5, 0.0], [0.7, 0.9]]
    metrics = all_metrics(matrix)
    assert metrics["forgetting"] == pytest.approx(-0.2)
    assert metrics["forgetting_with_last"] == 0.0


def test_forgetting_counts_a_score_from_before_the_task_was_trained() -> None:
    matrix = [[0.0, 0.0, 0.0], [0.5, 0.8, 0.0], [0.5, 0.6, 0.0], [0.5, 0.6, 0.9]]
    assert all_metrics(matrix)["forgetting"] == pytest.approx((0.0 + 0.2) / 2)


def test_only_seen_tasks_evaluated() -> None:
    matrix: list[list[float | None]] = [[None] * 3, [0.9, None, None], [0.6, 0.8, None], [0.7, 0.7, 0.5]]
    metrics = all_metrics(matrix)
    assert metrics["forward_transfer_zero_shot"] is None
    assert metrics["forward_transfer_absolute"] is None
    assert metrics["backward_transfer"] == pytest.approx(((0.7 - 0.9) + (0.7 - 0.8)) / 2)
    assert metrics["forgetting"] == pytest.approx(((0.9 - 0.7) + (0.8 - 0.7)) / 2)
    matrix[2][0] = None
    assert all_metrics(matrix)["forgetting"] is None


def test_stream_not_finished() -> None:
    matrix: list[list[float | None]] = [[0.1, 0.1, 0.1], [0.9, 0.2, 0.1], [0.6, 0.8, 0.1], [None, None, None]]
    missing = {"average_performance", "backward_transfer", "forgetting", "forgetting_with_last", "learning_accuracy"}
    metrics = all_metrics(matrix)
    assert {name for name in missing if metrics[name] is None} == missing
    assert metrics["forward_transfer_zero_shot"] == pytest.approx(0.05)


def test_one_task_has_no_transfer() -> None:
    metrics = all_metrics([[0.1], [0.9]])
    assert metrics["average_performance"] == metrics["learning_accuracy"] == 0.9
    others = {name for name, value in metrics.items() if value is None}
    assert others == set(metrics) - {"average_performance", "learning_accuracy"}


@pytest.mark.parametrize("matrix", [[], [[0.1]], [[0.1], [0.2], [0.3]], [[0.1, 0.2], [0.1, 0.2], [0.1]]])
def test_wrong_shape(matrix: list[list[float | None]]) -> None:
    with pytest.raises(ValueError, match="T\\+1 rows of T"):
        all_metrics(matrix)


def test_wrong_number_of_single_scores() -> None:
    with pytest.raises(ValueError, match="2 single-task scores for 3"):
        all_metrics(HAND, single=[0.5, 0.5])


@st.composite
def matrices(draw: st.DrawFn) -> list[list[float | None]]:
    """Complete matrices of 2 to 6 tasks."""
    tasks = draw(st.integers(2, 6))
    score = st.floats(0, 1)
    return [[draw(score) for _ in range(tasks)] for _ in range(tasks + 1)]


def known(value: float | None) -> float:
    """The value; fails if it is None."""
    assert value is not None
    return value


@given(matrices())
def test_relations_between_the_variants(matrix: list[list[float | None]]) -> None:
    tasks = len(matrix) - 1
    metrics = {name: value for name, value in all_metrics(matrix).items() if name != "forward_transfer_single"}
    values = {name: known(value) for name, value in metrics.items()}
    assert values["forgetting_with_last"] >= 0
    assert values["forgetting_with_last"] >= values["forgetting"] - 1e-12
    assert values["forgetting"] >= -values["backward_transfer"] - 1e-12
    assert values["backward_transfer_over_tasks"] * tasks == pytest.approx(values["backward_transfer"] * (tasks - 1))
    last = known(matrix[-1][-1])
    gained = values["average_performance"] * tasks - last - (values["learning_accuracy"] * tasks - last)
    assert values["backward_transfer"] * (tasks - 1) == pytest.approx(gained, abs=1e-9)


@given(matrices(), st.floats(-1, 1))
def test_a_constant_added_to_all_scores_moves_only_the_averages(matrix: list[list[float | None]], shift: float) -> None:
    moved = all_metrics([[known(value) + shift for value in row] for row in matrix])
    for name, value in all_metrics(matrix).items():
        if value is not None:
            averages = ("average_performance", "learning_accuracy", "forward_transfer_absolute")
            expected = value + shift if name in averages else value
            assert moved[name] == pytest.approx(expected, abs=1e-9)


@given(matrices())
def test_forward_transfer_against_itself_is_zero(matrix: list[list[float | None]]) -> None:
    single = [known(matrix[j + 1][j]) for j in range(len(matrix) - 1)]
    assert all_metrics(matrix, single)["forward_transfer_single"] == 0.0
