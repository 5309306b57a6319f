"""The generated tasks."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.tasks.formats.builtin import SEASONS, draw_destinations
from cl_dist.tasks.types import Task
from tests.tasks.data import load_one


def load(name: str) -> Task:
    return load_one(Path(), name, format="builtin")


@pytest.mark.parametrize("name", SEASONS)
def test_season_is_short_balanced_and_solvable(name: str) -> None:
    task = load(name)
    assert (len(task.train), len(task.evaluation), len(task.labels)) == (256, 64, 4)
    assert max(len(example.prompt.encode()) for example in task.train) <= 40
    destinations = draw_destinations(name)
    for example in (*task.train, *task.evaluation):
        *_, animal, cue = example.prompt.split()
        assert (cue, example.answer) == (f"{name}?", destinations[animal])


@pytest.mark.parametrize("name", [*SEASONS, "reverse", "prose"])
def test_no_sample_is_in_both_splits(name: str) -> None:
    task = load(name)
    assert len({*task.train, *task.evaluation}) == 320


def test_every_two_seasons_disagree_on_most_animals() -> None:
    maps = [draw_destinations(name) for name in SEASONS]
    for i, first in enumerate(maps):
        for second in maps[:i]:
            assert sum(first[animal] == second[animal] for animal in first) <= len(first) // 2


def test_samples_are_the_same_in_every_process() -> None:
    assert load("spring").train[0].prompt == "jolly idle hazy toad spring?"


def test_reverse_and_prose_are_generation_and_text() -> None:
    reverse, prose = load("reverse"), load("prose")
    assert (reverse.kind, reverse.labels, prose.kind, prose.labels) == ("generation", (), "text", ())
    assert all(e.prompt == f"reverse {e.answer[::-1]}:" for e in reverse.train)
    assert all(e.prompt == "" and e.answer.endswith(".") for e in prose.train)
