"""SIFT trains the elements that a dense run would choose by sorting whole gradients, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.chosen import Reports, by_world, run_by_world
from tests.ranks import run_ranks

JOBS = "tests.distributed.sift_jobs"
RELEASED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
REGATHERED = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
"""Weights are released after forward, and gathered once more for backward."""
CASES: dict[int, list[dict[str, Any]]] = {
    1: [{"stage": 0, "accumulation": 3, "clip": 0.1}, {"stage": 3, "deepspeed": RELEASED}],
    2: [
        {"stage": 0, "family": "gpt2", "clip": 0.1},
        {"stage": 1, "accumulation": 3, "clip": 0.1, "decay": 0.1},
        {"stage": 2, "accumulation": 3, "recompute": True, "rest": "trained"},
        {"stage": 3, "accumulation": 3, "clip": 0.1, "deepspeed": RELEASED, "layers": "all"},
        {"stage": 2, "family": "roberta", "layers": ["*attention*", "classifier.*"]},
        {"stage": 3, "family": "t5", "deepspeed": RELEASED, "recompute": True},
        {"stage": 3, "deepspeed": REGATHERED, "keep": 0.3},
        {"stage": 3, "family": "lora", "keep": 0.3, "accumulation": 3},
        {"stage": 1, "offload": True, "clip": 0.1},
        {"stage": 3, "offload": True, "clip": 0.1, "deepspeed": RELEASED},
        {"stage": 2, "dtype": "bfloat16", "clip": 0.1},
    ],
}


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    return run_by_world(request, f"{JOBS}:run_cases", CASES)


@pytest.mark.parametrize(("world", "case"), by_world(CASES))
def test_equals_the_dense_oracle(reports: Reports, world: int, case: int) -> None:
    report, settings = reports[world][case], CASES[world][case]
    if settings.get("dtype") == "bfloat16":
        # Rounded gradients are in another order; the dense oracle's are not rounded.
        assert report["other"] < 0.1
        return
    assert report["other"] == 0, "other elements than the oracle's"
    assert report["moved"] == [], "an element moved that was not chosen"
    assert report["still"] == [], "a trained part did not move"
    assert report["kept"] > 0
    if settings.get("rest") != "trained" and settings.get("keep", 0.05) == 0.05:
        assert report["trained"] <= 0.055 * report["dense"], "more than the kept elements has gradient and moments"
    assert report["apart"] <= 1e-6
    assert report["outputs"] <= 1e-5


def test_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    stages = [[2, 2], [3, 3], [1, 3], [0, 2]]
    apart = run_ranks(f"{JOBS}:through_states", 2, {"stages": stages, "folder": str(tmp_path)}, timeout=300)[0]
    for pair, distance in zip(stages, apart, strict=True):
        assert distance <= (0.0 if pair[0] == pair[1] else 1e-6)


@pytest.mark.parametrize("world", [1, 2])
def test_a_first_gradient_that_is_not_finite_ends_the_run(world: int) -> None:
    [message, *others] = run_ranks(f"{JOBS}:not_finite", world)
    assert "the first gradient (attempt 1): the gradient of " in message
    assert others == [message] * (world - 1)
