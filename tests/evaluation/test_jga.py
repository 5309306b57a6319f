"""Joint goal accuracy against the few lines that it is in TaSL's script, written once more."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.evaluation.jga import joint_goal_accuracy, slot_match
from cl_dist.tasks.types import Slot

VALUES = st.sampled_from(["6 pm", "6 PM", " 6 pm ", "none", "NONE", "", "6  pm", "san jose\n", "San José", "o'clock"])
SAMPLES = st.lists(
    st.tuples(st.integers(0, 3), st.sampled_from("ab"), VALUES, VALUES.map(lambda text: text.strip().lower())),
    min_size=1,
)


def oracle(samples: list[tuple[int, str, str, str]]) -> float:
    """Two dictionaries for every turn, wanted and found, equal or not."""
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
