"""Cases that ranks compute in one start, and only those that the chosen tests look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tests.ranks import run_ranks

WORLDS = (1, 2)
Reports = dict[int, dict[int, dict[str, Any]]]
"""By world size and number of the case."""


def parameters(cases: Sequence[dict[str, Any]]) -> list[Any]:
    """`(case, world)` for every case at every world size.

    One rank has no shards: what two do at every stage, it does at stage 0 often enough; the rest is slow.
    """
    return [
        pytest.param(
            number,
            world,
            id=f"{'-'.join(map(str, case.values()))}-{world}",
            marks=[pytest.mark.slow] if world == 1 and case["stage"] != 0 else [],
        )
        for number, case in enumerate(cases)
        for world in WORLDS
    ]


def run_chosen(request: pytest.FixtureRequest, job: str, cases: Sequence[dict[str, Any]]) -> Reports:
    """What `job` (see `run_ranks`) says of the chosen cases; the ranks of a world are started once."""
    found: Reports = {}
    for world in WORLDS:
        numbers = _chosen_cases(request, world)
        results = run_ranks(job, world, {"cases": [cases[number] for number in numbers]}, timeout=900)[0]
        found[world] = dict(zip(numbers, results, strict=True))
    return found


def _chosen_cases(request: pytest.FixtureRequest, world: int) -> list[int]:
    """Numbers of the cases that this module's tests at `world` ranks will look at, the first one always among them."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    parameters = [call.params for call in calls if call is not None]
    return sorted({0, *(each["case"] for each in parameters if each.get("world") == world and "case" in each)})


def by_world(cases: Mapping[int, Sequence[dict[str, Any]]]) -> list[Any]:
    """`(world, case)` for every case, by the number of ranks that compute it."""
    return [
        pytest.param(world, number, id=f"{'-'.join(map(str, case.values()))}-{world}")
        for world, of_world in cases.items()
        for number, case in enumerate(of_world)
    ]


def run_by_world(request: pytest.FixtureRequest, job: str, cases: Mapping[int, Sequence[dict[str, Any]]]) -> Reports:
    """As `run_chosen`, with other cases for every number of ranks."""
    calls = [getattr(item, "callspec", None) for item in request.session.items if item.path == request.path]
    wanted = {(call.params["world"], call.params["case"]) for call in calls if call and "case" in call.params}
    found: Reports = {}
    for world, of_world in cases.items():
        numbers = [number for number in range(len(of_world)) if (world, number) in wanted]
        if numbers:
            results = run_ranks(job, world, {"cases": [of_world[number] for number in numbers]}, timeout=900)[0]
            found[world] = dict(zip(numbers, results, strict=True))
    return found
