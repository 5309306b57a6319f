"""`cl_dist.shards` and the functions of docs/shards.md, on engines of two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cl_dist
from cl_dist.errors import BadInput
from tests.ranks import run_ranks
from tests.sharding.shards_jobs import ROWS, STAGES


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """By rank and stage, what `shards_jobs` saw."""
    return run_ranks("tests.sharding.shards_jobs:look", 2)


@pytest.mark.parametrize("stage", STAGES)
def test_gradients_are_those_of_the_whole_model(reports: list[dict[str, Any]], stage: str) -> None:
    first, second = (report[stage] for report in reports)
    assert first["names"] == ["body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias"]
    elements = 7 * 5 + 7 + 3 * 7 + 3
    if stage == "0":
        assert first["elements"] == second["elements"] == elements
    else:
        assert first["elements"] + second["elements"] == elements, "every element once"
    for report in (first, second):
        assert report["error"] < 1e-5, "float32, another order of sums"
        assert report["against deepspeed"] == 0
        assert report["norm error"] < 1e-5


@pytest.mark.parametrize("stage", STAGES)
def test_edits_reach_the_model(reports: list[dict[str, Any]], stage: str) -> None:
    for report in (each[stage] for each in reports):
        assert report["moved rows"] == ROWS
        assert report["moments before"] == {}
        assert report["moments after"]
        assert report["published"] == [0.5] * 3


def test_a_gradient_that_is_not_there_is_refused(reports: list[dict[str, Any]]) -> None:
    assert reports[0]["2"]["early"] == (
        "shards: the gradient of body.0.weight is not there; it can be read after the last engine.backward of a step "
        "and before engine.step"
    )
    with pytest.raises(BadInput, match="shards: Linear is no DeepSpeed engine with an optimiser"):
        cl_dist.shards(torch.nn.Linear(2, 2))


def test_the_benchmark_compares_what_it_times(reports: list[dict[str, Any]]) -> None:
    """Of benchmarks/local_views.py, with one block in place of thirty."""
    found = reports[0]["benchmark"]
    width, inner, heads = 576, 1536, 3 * 64
    block = 2 * width * width + 2 * width * heads + 3 * width * inner + 2 * width
    assert found["parameters"] == 49152 * width + width + block
    assert found["tensors"] == 11
    assert found["difference"] == 0
    assert all(found[name] > 0 for name in ("views", "norms", "gathered"))
