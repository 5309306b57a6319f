"""EWC, LwF and A-GEM on ZeRO shards equal their formulas on one process in plain PyTorch; measuring changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.ranks import run_ranks

WORLDS = (1, 2)
FLOAT32_ACCUMULATION = {"data_types": {"grad_accum_dtype": "fp32"}}
CASES: list[dict[str, Any]] = [
    {"method": "ewc", "stage": 0, "weight": 30.0, "fisher_samples": 4, "fisher_batch": 2},
    {"method": "ewc", "stage": 2, "weight": 30.0, "fisher_samples": 5, "accumulation": 3, "clip": 0.1},
    {"method": "ewc", "stage": 3, "weight": 30.0, "fisher_samples": 4, "lora": True},
    {"method": "lwf", "stage": 0, "weight": 3.0, "top_k": 7},
    {"method": "lwf", "stage": 2, "weight": 3.0, "top_k": None, "temperature": 3.0, "accumulation": 3, "clip": 0.1},
    {"method": "lwf", "stage": 3, "weight": 3.0, "lora": True},
    {"method": "agem", "stage": 0, "memory_ratio": 1.0},
    {"method": "agem", "stage": 2, "memory_ratio": 1.0, "memory_batch": 3, "accumulation": 3, "clip": 0.1},
    {"method": "agem", "stage": 3, "memory_ratio": 0.5, "lora": True, "recompute": True},
]  # fmt: skip
MORE: list[dict[str, Any]] = [
    {"method": "ewc", "stage": 1, "weight": 30.0, "fisher_samples": 3, "variant": "online", "gamma": 0.5,
     "offload": True, "clip": 0.1},
    {"method": "ewc", "stage": 3, "weight": 3.0, "fisher_samples": 3, "family": "roberta", "offload": True,
     "clip": 0.1},
    {"method": "ewc", "stage": 1, "weight": 30.0, "fisher_samples": 3, "dtype": "bfloat16", "clip": 0.1,
     "deepspeed": FLOAT32_ACCUMULATION},
    {"method": "lwf", "stage": 2, "weight": 3.0, "top_k": 5, "family": "t5"},
    {"method": "lwf", "stage": 3, "weight": 3.0, "top_k": 2, "family": "roberta"},
    {"method": "lwf", "stage": 0, "weight": 3.0, "dtype": "bfloat16"},
    {"method": "agem", "stage": 1, "memory_ratio": 0.5, "dtype": "bfloat16", "clip": 0.1,
     "deepspeed": FLOAT32_ACCUMULATION},
    {"method": "agem", "stage": 2, "memory_ratio": 0.5, "family": "t5", "offload": True, "clip": 0.1},
    {"method": "agem", "stage": 3, "memory_ratio": 0.3, "family": "roberta"},
]  # fmt: skip
"""On two ranks only."""
RUNS = [(1, case) for case in CASES] + [(2, case) for case in CASES + MORE]
QUIET: list[dict[str, Any]] = [
    {"stage": 0, "dtype": "bfloat16"},
    {"stage": 1, "accumulation": 2, "offload": True},
    {"stage": 2, "accumulation": 2},
    {"stage": 3},
]
PAIRS: list[dict[str, Any]] = [
    {"method": {"name": "ewc", "weight": 30.0, "fisher_samples": 4}, "stage": 2},
    {"method": {"name": "lwf", "weight": 3.0}, "stage": 2, "first": False},
    {"method": {"name": "agem", "memory_ratio": 1.0}, "stage": 3, "first": False},
]
BFLOAT16_STEP = 2**-7
"""Relative spacing of bfloat16, in which gradients are computed."""


@pytest.fixture(scope="module")
def reports() -> dict[int, dict[str, Any]]:
    """Every case; the ranks of a world are started once."""
    job = "tests.distributed.penalty_jobs:run_all"
    at_one = {"cases": CASES, "quiet": [], "pairs": []}
    at_two = {"cases": CASES + MORE, "quiet": QUIET, "pairs": PAIRS}
    return {1: run_ranks(job, 1, at_one, timeout=900)[0], 2: run_ranks(job, 2, at_two, timeout=900)[0]}


def named(case: dict[str, Any]) -> str:
    return "-".join(map(str, case.values()))


@pytest.mark.parametrize(("world", "case"), RUNS, ids=[f"{world}-{named(case)}" for world, case in RUNS])
def test_equals_the_dense_oracle(reports: dict[int, dict[str, Any]], world: int, case: dict[str, Any]) -> None:
    report = reports[world]["cases"][(CASES + MORE).index(case)]
    low = case.get("dtype") == "bfloat16"
    assert report["unpublished"] == 0.0, "the model's weights are not its masters"
    assert report["norms"] == 0.0, "the ranks clip by different norms"
    assert report["trained"] <= (4 * BFLOAT16_STEP if low else 1e-6)
    if case["method"] == "ewc":
        assert report["fisher"] <= (4 * BFLOAT16_STEP if low else 2e-6)  # a square: twice the relative error
        assert report["anchor"] <= (4 * BFLOAT16_STEP if low else 1e-6)
    if case["method"] == "agem":
        ours, oracles = report["projected"]
        assert ours == oracles
        assert ours > 0


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: named(CASES[number]))
def test_what_is_measured_does_not_depend_on_the_number_of_ranks(reports: dict[int, Any], number: int) -> None:
    case, measured = CASES[number], reports[1]["cases"][number]["measured"]
    assert measured == reports[2]["cases"][number]["measured"]
    assert (measured == []) == (case["method"] == "lwf")
    if case["method"] == "ewc":
        size, count = case.get("fisher_batch", 1), case["fisher_samples"]
        assert [len(some) for some in measured] == [size] * (3 * count // size)
        each = [index for some in measured for index in some]
        assert all(len(set(each[start : start + count])) == count for start in range(0, 3 * count, count))


@pytest.mark.parametrize("number", range(len(QUIET)), ids=lambda number: str(QUIET[number]))
def test_a_measurement_changes_nothing(reports: dict[int, dict[str, Any]], number: int) -> None:
    report = reports[2]["quiet"][number]
    assert report["gradient"] > 0.0
    assert report["responses"] == 10 * QUIET[number].get("accumulation", 1) // 2
    assert report["changed"] == []
    assert report["rate"] == report["sums"] == 0.0
    assert report["differs"] == [], "the run goes on otherwise after a measurement"


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda number: str(PAIRS[number]))
def test_with_migu_skipping_and_zeroing_agree(reports: dict[int, dict[str, Any]], number: int) -> None:
    report = reports[2]["pairs"][number]
    assert report["apart"] <= 1e-6
    assert report["effect"] > 1e-4, "the method changes nothing"


@pytest.mark.parametrize("world", [1, 2])
def test_more_samples_than_a_step_holds_are_refused(reports: dict[int, dict[str, Any]], world: int) -> None:
    fisher, memory = reports[world]["refused"]
    assert fisher.startswith(
        "method.fisher_batch: 5 is more than the 4 samples of an optimiser step (train.micro_batch"
    )
    assert memory.startswith("method.memory_batch: 5 is more than the 4 samples of an optimiser step")
    assert memory.endswith("allowed: 1 to 4")
