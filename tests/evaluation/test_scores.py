"""Exact match and ROUGE-L."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.evaluation.scores import SCORES, exact_match, rouge_l


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Sports", "sports", 1.0),
        ("  very \n positive\t", "Very  Positive", 1.0),
        ("sport", "sports", 0.0),
        ("very positive", "verypositive", 0.0),
        ("", "sports", 0.0),
    ],
)
def test_exact_match(prediction: str, reference: str, score: float) -> None:
    assert exact_match(prediction, reference) == score


def test_rouge_l_by_hand() -> None:
    # Longest common subsequence "the cat mat": 3 of 4 predicted and 3 of 6 reference words.
    precision, recall = 3 / 4, 3 / 6
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l("the cat red mat", "the cat sat on the mat") == pytest.approx(expected)


def test_rouge_l_stems() -> None:
    assert rouge_l("cats running", "cat runs") == 1.0


def test_rouge_l_of_nothing() -> None:
    assert rouge_l("", "a reference") == 0.0


@given(st.text(), st.text(), st.sampled_from(sorted(SCORES)))
def test_between_zero_and_one_and_symmetric(first: str, second: str, name: str) -> None:
    score = SCORES[name]
    assert 0.0 <= score(first, second) <= 1.0
    assert score(first, second) == pytest.approx(score(second, first))
