"""Recurrent-KIF on ZeRO shards equals Recurrent-KIF on one process in plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.chosen import Reports, parameters, run_chosen

CASES: list[dict[str, Any]] = [
    {"stage": 0, "units": "row", "order": "first"},
    {"stage": 1, "units": "rank", "order": "mixed", "accumulation": 2, "orthogonal": 0.1},
    {"stage": 2, "units": "row", "order": "second", "clip": 0.1},
    {"stage": 2, "units": "rank", "order": "first", "offload": True, "outer_learning_rate": 3e-2},
    {"stage": 3, "units": "matrix", "order": "first", "outer_learning_rate": 3e-2, "accumulation": 2},
    {"stage": 3, "units": "rank", "order": "second", "clip": 0.1},
    {"stage": 2, "units": "rank", "order": "first", "dtype": "bfloat16"},
    {"stage": 0, "units": "rank", "order": "first", "schedule_over": "all_steps", "empty_outer_scores": True},
    {"stage": 0, "units": "row", "order": "first", "masks": "elements", "importance_at": "after_update", "clip": 0.1},
    {"stage": 1, "units": "row", "order": "mixed", "masks": "elements", "empty_inner_scores": True},
    {"stage": 2, "units": "rank", "order": "first", "masks": "elements", "importance_at": "after_update", "clip": 0.1,
     "empty_inner_scores": True, "fuse_last_cycle": False, "schedule_over": "inner_steps", "outer_loss_weight": 0.25},
    {"stage": 3, "units": "rank", "order": "first", "schedule_over": "inner_steps", "outer_loss_weight": 0.25,
     "importance_at": "after_update", "clip": 0.1},
    {"stage": 3, "units": "row", "order": "first", "masks": "elements", "fuse_last_cycle": False},
]  # fmt: skip


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    """See `run_chosen`."""
    return run_chosen(request, "tests.distributed.recurrent_jobs:run_cases", CASES)


@pytest.mark.parametrize(("case", "world"), parameters(CASES))
def test_equals_the_dense_oracle(reports: Reports, world: int, case: int) -> None:
    report, settings = reports[world][case], CASES[case]
    assert report["left"] == 0.0, "the next task's importance does not start at zero"
    assert report["shares"] == 0.0, "the first task was fused"
    assert report["kinds"] >= 3, "the masks decide too little for this to be a test"
    shares = max(report["share_new"], report["share_old"])
    assert shares == 0.0 or (settings.get("masks") == "elements" and shares < 1e-12), "other masks"
    if settings.get("dtype") == "bfloat16":
        assert max(report[q] for q in ("first", "fused", "current", "past")) <= 4 * 2**-7
        return
    assert max(report["given current"], report["given past"]) <= 1e-6
    # As in test_kif: a rank's score multiplies two means, and the second order squares.
    factor = (2 if settings["units"] == "rank" else 1) * (2 if settings["order"] == "second" else 1)
    assert max(report["first"], report["fused"]) <= 1e-6
    assert max(report["current"], report["past"]) <= factor * 2e-6
