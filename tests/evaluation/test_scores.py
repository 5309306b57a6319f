"""Exact match, ROUGE-L, macro-F1, and joint goal accuracy compared with the lines of TaSL's script, written again."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.config.schema import EvalConfig
from cl_dist.evaluation.scores import (
    NORMALISERS,
    SCORES,
    comparison,
    exact_match,
    joint_goal_accuracy,
    macro_f1,
    rouge_l,
    slot_match,
)
from cl_dist.tasks.types import Slot


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Sports", "sports", 1.0),
        ("  very \n positive\t", "Very  Positive", 1.0),
        ("sport", "sports", 0.0),
        ("very positive", "verypositive", 0.0),
        ("", "sports", 0.0),
        ("sports.", "sports", 0.0),
        ("CAFE\u0301", "caf\u00e9", 1.0),  # a combining accent, or a composed letter
        ("cafe", "caf\u00e9", 0.0),
    ],
)
def test_exact_match(prediction: str, reference: str, score: float) -> None:
    assert exact_match(prediction, reference) == score


@pytest.mark.parametrize(
    ("prediction", "reference", "score"),
    [
        ("Sports.", "sports", 1.0),
        (" 'very'  positive!\n", "Very positive", 1.0),
        ("very-positive", "very positive", 0.0),  # the hyphen is removed, not replaced
        ("e-mail", "email", 1.0),
        ("\uff11\u3002", "\uff11", 0.0),  # only ASCII punctuation is removed
        ("e-\u0301", "\u00e9", 1.0),
        ("STRASSE", "stra\u00dfe", 0.0),  # lower case is not case folding
        ("...", "", 1.0),
    ],
)
def test_exact_match_without_punctuation(prediction: str, reference: str, score: float) -> None:
    """Except for the accents, all values are those of compute_metrics.py in the public code of O-LoRA and MIGU."""
    compared = comparison("exact_match", EvalConfig(normalise="punctuation"))
    assert compared.score(prediction, reference) == score
    assert macro_f1([(prediction, reference)], ["other"], compared.normaliser) == score


@given(st.text())
def test_texts_that_look_the_same_score_the_same(text: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    for normal in NORMALISERS:
        for metric in SCORES:
            score = comparison(metric, EvalConfig(normalise=normal)).score  # type: ignore[arg-type]
            assert score(composed, decomposed) == score(composed, composed)


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


LABELS = ["World", "sports", "very positive", "no"]


@given(st.lists(st.tuples(st.sampled_from(LABELS), st.sampled_from(LABELS)), min_size=1, max_size=30))
def test_macro_f1_is_that_of_scikit_learn(pairs: list[tuple[str, str]]) -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn comes with the extra `general`")
    expected = metrics.f1_score([pair[1] for pair in pairs], [pair[0] for pair in pairs], average="macro")
    assert macro_f1(pairs, LABELS) == pytest.approx(expected)


def test_macro_f1_by_hand() -> None:
    """Sports: 1 hit, 2 predicted, 1 expected; World: 1 hit, 1 predicted, 2 expected; no: one missed by a text."""
    pairs = [(" Sports", "sports"), ("sports", "world"), ("World", "world"), ("tennis", "no")]
    assert macro_f1(pairs, LABELS) == pytest.approx((2 / 3 + 2 / 3 + 0) / 3)
    assert macro_f1([("World", "no")], LABELS) == 0.0
    with pytest.raises(ValueError, match="no sample"):
        macro_f1([], LABELS)


VALUES = st.sampled_from(["6 pm", "6 PM", " 6 pm ", "none", "NONE", "", "6  pm", "san jose\n", "San José", "o'clock"])
SAMPLES = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from("ab"), VALUES, VALUES.map(lambda text: text.strip().lower())),
    min_size=1,
)


def oracle(samples: list[tuple[int, str, str, str]]) -> float:
    """For every turn, compare the dictionaries of expected and predicted slots."""
    wanted: dict[int, dict[str, str]] = {}
    found: dict[int, dict[str, str]] = {}
    for turn, name, prediction, reference in samples:
        wanted.setdefault(turn, {})[name] = reference
        found.setdefault(turn, {})[name] = prediction.strip().lower()
    return sum(found[turn] == wanted[turn] for turn in wanted) / len(wanted)


@given(SAMPLES)
def test_it_is_the_share_of_turns_whose_states_are_equal(samples: list[tuple[int, str, str, str]]) -> None:
    outcomes = [(Slot(str(turn), name), slot_match(said, right) == 1.0) for turn, name, said, right in samples]
    assert joint_goal_accuracy(outcomes) == oracle(samples)


def test_of_two_samples_for_a_slot_of_a_turn_the_last_counts() -> None:
    slot = Slot("1_00000-2", "restaurants_2-time")
    assert joint_goal_accuracy([(slot, False), (slot, True)]) == 1.0
    assert joint_goal_accuracy([(slot, True), (slot, False)]) == 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("6 PM", "6 pm", 1.0),
        (" 6 pm\n", "6 pm", 1.0),
        ("6  pm", "6 pm", 0.0),
        ("6 pm", "6 PM", 0.0),
        ("6 pm.", "6 pm", 0),
    ],
)
def test_a_slot_is_compared_as_the_public_script_compares_it(prediction: str, reference: str, expected: float) -> None:
    assert slot_match(prediction, reference) == expected


def test_no_sample() -> None:
    with pytest.raises(ValueError, match="no turn to be right"):
        joint_goal_accuracy([])
