"""What the zoo's test files share: each visits its part of the models once, in a process of its own."""

from __future__ import annotations

from typing import Any

from tests.ranks import run_ranks
from tests.zoo.families import SPECIMENS
from tests.zoo.table import broken, lines_of, refusals, row

Found = dict[str, dict[str, Any]]


def visit(names: list[str]) -> Found:
    """Every model trained in each way, by name."""
    (found,) = run_ranks("tests.zoo.jobs:tour", 1, {"names": names}, timeout=600)
    return dict(found)


def part(family: str) -> list[str]:
    """The models of a family."""
    return [name for name, specimen in SPECIMENS.items() if specimen.family == family]


def check_model(name: str, found: dict[str, Any]) -> None:
    """It works or is refused before its first step, in every way, as docs/models.md says."""
    assert not broken(found)
    assert lines_of(name) == [row(name, found), *refusals(name, found)], "run python -m tests.zoo"


def check_positions(found: dict[str, Any]) -> None:
    """The project knows the longest input and answer before training, from config.json and from the loaded model."""
    assert found["told"] == found["tried"]
    assert found["configured"] == found["tried"]
