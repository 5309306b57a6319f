"""Shared by the zoo's test files, each of which trains its part of the models once, in a separate process."""

from __future__ import annotations

from typing import Any

from tests.ranks import run_ranks
from tests.zoo.families import SPECIMENS
from tests.zoo.table import broken, lines_of, refusals, row

Found = dict[str, dict[str, Any]]


def visit(names: list[str]) -> Found:
    """Train each model in every way; the outcomes by model name."""
    (found,) = run_ranks("tests.zoo.jobs:tour", 1, {"names": names}, timeout=600)
    return dict(found)


def part(family: str) -> list[str]:
    """The models of a family."""
    return [name for name, specimen in SPECIMENS.items() if specimen.family == family]


def check_model(name: str, found: dict[str, Any]) -> None:
    """Assert that every training works or is refused before its first step, as docs/models.md says."""
    assert broken(found) == {}
    assert lines_of(name) == [row(name, found), *refusals(name, found)], "run python -m tests.zoo"


def check_positions(found: dict[str, Any]) -> None:
    """Assert that config.json and the loaded model both give the true longest input and answer."""
    assert found["predicted"] == found["tried"]
    assert found["configured"] == found["tried"]
