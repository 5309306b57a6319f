"""What the campaign counts as a hit and as a pass; the campaign itself is run manually."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.faults.campaign import (
    FAULTS,
    RECIPES,
    Outcome,
    moments,
    problem_of_a_full_disk,
    problem_of_a_stop,
    table,
    what_hits,
)
from tests.ranks import REPOSITORY

EVENTS = ["evaluation", "step", "step", "saved", "step", "evaluation", "evaluation"]
SENTENCE = "cl-dist: error: no space left on the disk of run/manifest.json: nothing was replaced"


@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_fault_comes_when_there_is_something_to_hit(fault: str) -> None:
    needs_a_state = any(word in fault for word in ("truncated", "flipped", "deleted"))
    assert moments(fault, EVENTS) == (4 if needs_a_state else 0, 5)


@pytest.mark.parametrize(
    ("code", "began", "right"),
    [
        (75, True, True),
        (-15, False, True),
        (143, False, True),
        (-15, True, False),
        (143, True, False),
        (1, False, False),
    ],
)
def test_the_end_after_a_sigterm(code: int, began: bool, right: bool) -> None:
    assert (problem_of_a_stop(code, began) is None) is right


@pytest.mark.parametrize(
    ("code", "texts", "right"),
    [
        (1, ["step 3/10", SENTENCE], True),
        (1, ["step 3/10", "cl-dist: error: internal error: OSError: no space left on device"], False),
        (1, ["", ""], False),
        (1, [f"Traceback (most recent call last):\n{SENTENCE}"], False),
        (2, [SENTENCE], False),
    ],
)
def test_the_end_on_a_full_disk(code: int, texts: list[str], right: bool) -> None:
    assert (problem_of_a_full_disk(code, texts) is None) is right


def test_every_fault_hits_every_recipe_equally_often() -> None:
    runs = Counter(what_hits(number) for number in range(12 * len(FAULTS)))
    assert runs == {(fault, recipe): 4 for fault in FAULTS for recipe in RECIPES}


def test_a_number_means_the_same_run_as_ever() -> None:
    lines = (REPOSITORY / "benchmarks" / "results" / "faults.jsonl").read_text().splitlines()
    known = [Outcome(**json.loads(line)) for line in lines]
    assert [what_hits(outcome.number) for outcome in known] == [(outcome.fault, outcome.recipe) for outcome in known]


def test_a_run_that_was_not_hit_has_not_passed() -> None:
    outcomes = [
        Outcome(0, "SIGTERM", "r", 3, "same weights", hit=True),
        Outcome(1, "SIGTERM", "r", 3, "not hit"),
        Outcome(2, "disk full", "r", 3, "refused, then same weights", hit=True),
    ]
    assert table(outcomes).splitlines()[2:] == [
        "| SIGTERM | 2 | 1 | 1 | 0 | 1 |",
        "| disk full | 1 | 1 | 0 | 1 | 0 |",
        "| all | 3 | 2 | 1 | 1 | 1 |",
    ]
