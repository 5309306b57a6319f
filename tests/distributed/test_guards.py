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
        (1, "gradient", {}),
        (1, "gradient", {"offload": True, "accumulation": 2}),
        (1, "gradient", {"dtype": "bfloat16", "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}),
        (2, "loss", {"dtype": "bfloat16"}),
        (2, "gradient", {"accumulation": 2}),
        (2, "gradient", {"offload": True}),
        (3, "loss", {"accumulation": 2}),
        (3, "gradient", {}),
        (3, "gradient", {"offload": True, "accumulation": 2}),
        (3, "gradient", {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}),
    ]
]
PARAMETER = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def reports() -> list[list[dict[str, Any]]]:
    return run_ranks("tests.distributed.guard_jobs:run_skips", 2, {"cases": CASES}, timeout=600)


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
def test_a_bad_step_changes_nothing_and_leaves_nothing(number: int, reports: list[list[dict[str, Any]]]) -> None:
    for rank in range(2):
        report = reports[rank][number]
        assert report["changed"] == []
        assert report["sums left"] == 0.0
        assert report["skipped after"] is None
        assert report["differs"] == [], "the run without the bad step ends otherwise"
        assert report["moved"] > 0
    told = reports[0][number]["skipped"]
    assert told == reports[1][number]["skipped"]
    if CASES[number]["kind"] == "loss":
        first = "4, 5" if "accumulation" in CASES[number] else "2, 3"
        assert told.startswith(f"the loss is nan on samples {first} (rank 1)")
        assert "rank 0" not in told
    else:
        assert told.startswith(f"the gradient of {PARAMETER} is not finite, though the loss is, on samples 0, 1, 2, 3")


STOPS: list[tuple[list[str], dict[str, Any]]] = [
    (["healthy", "loss"], {"stage": 2, "max_skipped": 0}),
    (["gradient"], {"stage": 3, "max_skipped": 0}),
    (["loss", "gradient", "healthy", "loss", "loss", "loss"], {"stage": 0, "max_skipped": 2}),
]


@pytest.fixture(scope="module")
def stops() -> list[list[list[str]]]:
    cases = [{"steps": steps, **settings} for steps, settings in STOPS]
    return run_ranks("tests.distributed.guard_jobs:run_stops", 2, {"cases": cases}, timeout=300)


def test_without_skipping_the_first_bad_step_stops_all_ranks(stops: list[list[list[str]]]) -> None:
    for rank in range(2):
        assert stops[rank][0][0] == "done"
        assert stops[rank][0][1].startswith("task t, step 2: the loss is nan on samples 2, 3 (rank 1); no weight")
        assert stops[rank][1][0].startswith(f"task t, step 1: the gradient of {PARAMETER} is not finite")


def test_so_many_in_a_row_are_skipped_and_no_more(stops: list[list[list[str]]]) -> None:
    for rank in range(2):
        outcomes = stops[rank][2]
        assert [outcome.partition(" is ")[0] for outcome in outcomes[:5]] == [
            "the loss",
            f"the gradient of {PARAMETER}",
            "done",
            "the loss",
            "the loss",
        ]
        assert outcomes[5].startswith(
            "task t, step 6: the loss is nan on samples 2, 3 (rank 1), and the 2 before it were skipped already"
        )


def test_a_rank_with_another_weight_is_found() -> None:
    stages = [0, 1, 2, 3]
    for reports in run_ranks("tests.distributed.guard_jobs:run_replicas", 2, {"stages": stages}, timeout=300):
        for stage, report in zip(stages, reports, strict=True):
            if stage < 3:
                assert report["compared"] == report["parameters"]
            else:
                assert 0 < report["compared"] <= report["parameters"]
            assert report["told"].startswith(
                "here: the ranks no longer hold the same weights: model.norm.weight differs between rank 0 and rank 1"
            )
        assert reports[0]["in the step"].startswith("task t, step 4: the ranks no longer hold the same weights: ")
