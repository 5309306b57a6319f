"""KIF and TaSL on ZeRO shards equal KIF and TaSL on one process in plain PyTorch."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import pytest

from tests.distributed.chosen import Reports, parameters, run_chosen

FACTORS: dict[str, tuple[Any, ...]] = {
    "stage": (0, 1, 2, 3),
    "units": ("matrix", "rank", "row"),
    "order": ("first", "second", "mixed"),
    "fusion": ("adaptive", "hard"),
}
"""Every pair of values of two factors occurs, at every world size; rank units come with LoRA."""
SELECTION: list[dict[str, Any]] = [
    {"stage": 0, "units": "matrix", "order": "first", "fusion": "hard", "clip": 0.1},
    {"stage": 0, "units": "rank", "order": "mixed", "fusion": "adaptive", "orthogonal": 0.1},
    {"stage": 0, "units": "row", "order": "second", "fusion": "adaptive", "accumulation": 3},
    {"stage": 1, "units": "matrix", "order": "second", "fusion": "adaptive", "lora": True, "orthogonal": 0.5},
    {"stage": 1, "units": "rank", "order": "first", "fusion": "hard", "accumulation": 3, "clip": 0.1},
    {"stage": 1, "units": "row", "order": "mixed", "fusion": "hard", "clip": 0.1},
    {"stage": 2, "units": "matrix", "order": "mixed", "fusion": "adaptive", "accumulation": 3},
    {"stage": 2, "units": "rank", "order": "second", "fusion": "hard", "orthogonal": 0.1, "clip": 0.1},
    {"stage": 2, "units": "row", "order": "first", "fusion": "adaptive", "lora": True},
    {"stage": 3, "units": "matrix", "order": "mixed", "fusion": "hard", "accumulation": 3, "clip": 0.1},
    {"stage": 3, "units": "rank", "order": "first", "fusion": "adaptive", "orthogonal": 0.1, "accumulation": 3},
    {"stage": 3, "units": "row", "order": "second", "fusion": "adaptive", "lora": True},
]
SPECIAL: list[dict[str, Any]] = [
    {"stage": 1, "units": "row", "offload": True, "clip": 0.1, "accumulation": 3},
    {"stage": 2, "units": "rank", "offload": True, "clip": 0.1, "orthogonal": 0.1},
    {"stage": 3, "units": "rank", "offload": True, "clip": 0.1, "accumulation": 3, "orthogonal": 0.1},
    {"stage": 0, "units": "row", "family": "roberta"},
    {"stage": 2, "units": "rank", "family": "roberta", "orthogonal": 0.1},
    {"stage": 3, "units": "matrix", "family": "t5", "order": "first", "fusion": "hard", "lora": True},
    {"stage": 2, "units": "matrix", "keep_optimizer": True},
    {"stage": 2, "units": "rank", "beta1": 0.5, "beta2": 0.7, "tau": 0.1, "accumulate_new": 0.6},
    {
        "stage": 3, "units": "row", "fusion": "hard", "threshold": 40.0, "weight_new": 0.4, "weight_old": 0.6,
        "weight_neither": 0.25,
    },
    {"stage": 3, "units": "rank", "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
    {"stage": 0, "units": "rank", "dtype": "bfloat16", "accumulation": 3},
    {"stage": 1, "units": "matrix", "dtype": "bfloat16", "clip": 0.1,
     "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}},
    {"stage": 2, "units": "row", "dtype": "bfloat16"},
    {"stage": 3, "units": "rank", "dtype": "bfloat16", "accumulation": 3, "orthogonal": 0.1},
    {"stage": 2, "units": "matrix", "importance_dtype": "bfloat16"},
    {"stage": 3, "units": "rank", "importance_dtype": "bfloat16", "order": "second"},
    *({"stage": stage, "importance_at": "after_update", **rest} for stage, rest in (
        (0, {"units": "matrix", "order": "first", "fusion": "hard", "clip": 0.1, "importance_from_step": 2}),
        (1, {"units": "row", "clip": 0.1, "accumulation": 3}),
        (2, {"units": "rank", "clip": 0.1, "orthogonal": 0.1, "importance_from_step": 2}),
        (3, {"units": "rank", "order": "second", "clip": 0.1}),
        (2, {"units": "matrix", "offload": True, "clip": 0.1}),
        (3, {"units": "row", "offload": True, "clip": 0.1}),
        (0, {"units": "rank", "dtype": "bfloat16"}),
        (1, {"units": "rank", "dtype": "bfloat16", "clip": 0.1,
             "deepspeed": {"data_types": {"grad_accum_dtype": "fp32"}}}),
    )),
    *({"stage": stage, "units": units, "offload": offload, "dtype": "bfloat16", "grad_dtype": "float32",
       "accumulation": 3}
      for stage, units, offload in (
          (1, "matrix", False), (2, "row", False), (3, "rank", False), (1, "row", True), (2, "rank", True),
          (3, "matrix", True),
      )),
    {"stage": 2, "units": "rank", "by_task": {
        "t1": {"tau": 0.1, "order": "first", "beta1": 0.5, "accumulate_new": 0.6},
        "t2": {"fusion": "hard", "threshold": 40.0, "weight_new": 0.4, "weight_old": 0.6, "orthogonal": 0.5},
    }},
]  # fmt: skip
CASES = [{"lora": case["units"] == "rank", **case} for case in SELECTION + SPECIAL]

ELEMENTS = ("smoothed", "uncertainty")
UNITS = ("score", "normalised", "accumulated", "share")
WEIGHTS = ("trained", "fused")
BFLOAT16_STEP = 2**-7
"""Relative spacing of bfloat16, in which gradients are reduced."""


def test_the_selection_covers_every_pair_of_settings() -> None:
    for (first, first_values), (second, second_values) in combinations(FACTORS.items(), 2):
        for pair in product(first_values, second_values):
            assert any((case[first], case[second]) == pair for case in SELECTION), (first, second, pair)


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    """See `run_chosen`."""
    return run_chosen(request, "tests.distributed.kif_jobs:run_cases", CASES)


@pytest.mark.parametrize(("case", "world"), parameters(CASES))
def test_equals_the_dense_oracle(reports: Reports, world: int, case: int) -> None:
    report, settings = reports[world][case], CASES[case]
    assert report["unpublished"] == 0.0, "the model's weights are not its masters"
    assert report["kept"] == 0.0, "the weights kept for the next fusion are not the fused ones"
    assert report["left"] == 0.0, "the next task's importance does not start at zero"
    if settings.get("dtype") == "bfloat16":
        assert max(report[quantity] for quantity in ELEMENTS + UNITS + WEIGHTS) <= 4 * BFLOAT16_STEP
        # What KIF makes of weights and gradients is as exact as in float32.
        assert max(report[f"given {quantity}"] for quantity in (*UNITS, "fused")) <= 1e-6
        if settings.get("grad_dtype") == "float32":
            assert report["sum"] <= 1e-6, "gradients were rounded while they were summed"
        elif settings.get("accumulation", 1) > 1 and "sum" in report:
            assert report["sum"] > BFLOAT16_STEP / 16, "the comparison would not notice a sum in bfloat16"
        return
    if settings.get("importance_dtype") == "bfloat16":
        assert max(report[quantity] for quantity in ELEMENTS + UNITS + WEIGHTS) <= 4 * BFLOAT16_STEP
        assert min(report[quantity] for quantity in ELEMENTS) > 1e-6, "importance was kept in float32"
        return
    assert max(report[f"given {quantity}"] for quantity in (*UNITS, "fused")) <= 1e-6
    # Against the oracle's own gradients, whose sums are rounded in another order: a score is a mean of products of two
    # numbers; a rank's multiplies two means, and the second order squares.
    factor = (2 if settings["units"] == "rank" else 1) * (2 if settings.get("order") == "second" else 1)
    assert max(report[quantity] for quantity in UNITS) <= factor * 1e-6
    assert max(report[quantity] for quantity in ELEMENTS) <= factor * 2e-6
    assert max(report[quantity] for quantity in WEIGHTS) <= 1e-6
    assert report["each"] <= factor * 2e-5, "a score that is small beside the others is wrong"
