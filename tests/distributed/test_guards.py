"""NaN and infinity never reach weights, moments or what methods measure, at any stage; ranks that differ are found."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

CASES: list[dict[str, Any]] = [
    {"stage": stage, "kind": kind, **more}
    for stage, kind, more in [
        (0, "loss", {}),
        (0, "gradient", {"clip": None}),
        (0, "gradient", {"dtype": "bfloat16"}),
        (1, "loss", {"accumulation": 2}),
        (1, "gradient", {"offload": True, "accumulation": 2}),
        (1, "gradient", {"dtype": "bfloat16", "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}),
        (2, "loss", {"dtype": "bfloat16"}),
        (2, "gradient", {"accumulation": 2}),
        (2, "gradient", {"offload": True}),
        (3, "loss", {"accumulation": 2}),
        (3, "gradient", {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}),
        (3, "gradient", {"offload": True, "accumulation": 2}),
    ]
]
STOPS: list[dict[str, Any]] = [
    {"steps": ["healthy", "loss"], "stage": 2, "max_skipped": 0},
    {"steps": ["gradient"], "stage": 3, "max_skipped": 0},
    {"steps": ["loss", "gradient", "healthy", "loss", "loss", "loss"], "stage": 0, "max_skipped": 2},
]
STAGES = [0, 1, 2, 3]
PARAMETER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    arguments = {"skips": CASES, "stops": STOPS, "stages": STAGES}
    return run_ranks("tests.distributed.guard_jobs:run_all", 2, arguments, timeout=900)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_bad_step_changes_nothing_and_leaves_nothing(number: int, reports: list[dict[str, Any]]) -> None:
    of_ranks = [report["skips"][number] for report in reports]
    for report in of_ranks:
        assert report["changed"] == []
        assert report["sums left"] == 0.0
        assert report["skipped after"] is None
        assert report["differs"] == [], "the run without the bad step ends otherwise"
        assert report["moved"] > 0
    told = of_ranks[0]["skipped"]
    assert told == of_ranks[1]["skipped"]
    if CASES[number]["kind"] == "loss":
        first = "4, 5" if "accumulation" in CASES[number] else "2, 3"
        assert told.startswith(f"the loss is nan on samples {first} (rank 1)")
        assert "rank 0" not in told
    else:
        assert told.startswith(f"the gradient of {PARAMETER} is not finite, though the loss is, on samples 0, 1, 2, 3")


def test_a_cycle_that_ends_with_a_bad_step_is_fused_all_the_same(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        assert report["cycle"]["skipped"] is not None
        assert report["cycle"]["fused"] > 0
        assert report["cycle"]["differs"] == []


def test_without_skipping_the_first_bad_step_stops_all_ranks(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        first, second, _ = report["stops"]
        assert first[0] == "done"
        assert first[1].startswith("task t, step 2: the loss is nan on samples 2, 3 (rank 1); no weight has changed")
        assert second[0].startswith(f"task t, step 1: the gradient of {PARAMETER} is not finite")


def test_so_many_in_a_row_are_skipped_and_no_more(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        *skipped, last = report["stops"][2]
        told = [outcome.partition(" is ")[0] for outcome in skipped]
        assert told == ["the loss", f"the gradient of {PARAMETER}", "done", "the loss", "the loss"]
        assert last.startswith(
            "task t, step 6: the loss is nan on samples 2, 3 (rank 1), and the 2 steps before it were already skipped"
        )


def test_a_rank_with_another_weight_is_found(reports: list[dict[str, Any]]) -> None:
    told = "the ranks no longer hold the same weights: model.norm.weight differs between rank 0 and rank 1"
    for report in reports:
        for stage, found in zip(STAGES, report["replicas"], strict=True):
            assert 0 < found["compared"] <= found["parameters"]
            assert found["compared"] == found["parameters"] or stage == 3
            assert found["told"].startswith(f"here: {told}")
        assert report["replicas"][0]["in the step"].startswith("task t, step 4: the ranks no longer hold the same")
