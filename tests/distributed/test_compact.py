"""Kept rows alone on the wire train the same weights as whole tensors, and are as few bytes as they should be."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.chosen import Reports, by_world, run_by_world

ROUNDING = 3 * 2**-23
"""Three steps, each of which may round a sum of three ranks in another order."""
ZERO = "zero_optimization"
CASES: dict[int, list[dict[str, Any]]] = {
    2: [
        {"stage": 1, "mask": "update", "clip": 0.1},
        {"stage": 2, "clip": 0.1, "decay": 0.1},
        {"stage": 2, "mask": "update", "offload": True, "clip": 0.1, "family": "t5"},
        {"stage": 2, "sums": "task", "scope": "ahead", "accumulation": 3, "family": "roberta", "clip": 0.1},
        {"stage": 1, "scope": "micro_batch", "accumulation": 3, "mask": "update", "lora": True},
        {"stage": 2, "deepspeed": {ZERO: {"use_multi_rank_bucket_allreduce": False, "reduce_bucket_size": 500}}},
        {"stage": 2, "dtype": "bfloat16", "grad_dtype": "float32", "deepspeed": {ZERO: {"reduce_scatter": False}}},
        {"stage": 2, "dtype": "bfloat16", "grad_dtype": "float32", "deepspeed": {ZERO: {"overlap_comm": True}}},
    ],
    3: [
        {"stage": 1, "clip": 0.1, "deepspeed": {ZERO: {"parameter_alignment": True}}},
        {"stage": 2, "mask": "update", "clip": 0.1, "offload": True},
        {"stage": 2, "deepspeed": {ZERO: {"use_multi_rank_bucket_allreduce": False}}},
    ],
}


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    """See `run_by_world`."""
    return run_by_world(request, "tests.distributed.compact_jobs:run_cases", CASES)


@pytest.mark.parametrize(("world", "case"), by_world(CASES))
def test_equals_whole_tensors(reports: Reports, world: int, case: int) -> None:
    """Two ranks add up in the only order there is; three may round differently."""
    report = reports[world][case]
    bound = 0.0 if world == 2 else ROUNDING
    assert max(report["difference"].values()) <= bound
    assert report["norms"] <= bound
    assert report["replicas"], "the ranks have different weights"
    assert not report["left"], "DeepSpeed does not have its own functions back"


@pytest.mark.parametrize(("world", "case"), by_world(CASES))
def test_fewer_bytes_travel(reports: Reports, world: int, case: int) -> None:
    """In the collectives of the gradient; the log says so."""
    report, settings = reports[world][case], CASES[world][case]
    kind = "all_reduce" if settings["stage"] < 3 else "reduce"
    if settings.get("deepspeed", {}).get(ZERO, {}).get("use_multi_rank_bucket_allreduce") is False:
        kind = "reduce"
    assert report["bytes"]["auto"][kind] < 0.8 * report["bytes"]["off"][kind]
    assert "only the kept rows travel" in report["message"]["auto"]
    assert "whole gradients travel between the ranks: method.compact: off" in report["message"]["off"]
