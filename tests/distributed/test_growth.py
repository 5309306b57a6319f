"""IncLoRA and O-LoRA on ZeRO shards equal a dense oracle; old adapters never move, and come back from a state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

JOBS = "tests.distributed.growth_jobs"
CASES: list[dict[str, Any]] = [
    {"stage": 0, "lambda1": 0.05, "lambda2": 0.02},
    {"stage": 1, "lambda1": 0.05, "accumulation": 3},
    {"stage": 2, "lambda1": 0.05, "clip": 0.1},
    {"stage": 2, "lambda1": 0.0, "lambda2": 0.1},
    {"stage": 2, "lambda1": 0.0, "lambda2": 0.0},
    {"stage": 2, "lambda1": 0.05, "offload": True, "clip": 0.1},
    {"stage": 3, "lambda1": 0.05, "lambda2": 0.02, "accumulation": 3},
    {"stage": 3, "lambda1": 0.05, "clip": 0.1,
     "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
    {"stage": 3, "lambda1": 0.05, "offload": True, "clip": 0.1},
    {"stage": 0, "lambda1": 0.05, "dtype": "bfloat16"},
    {"stage": 2, "lambda1": 0.05, "dtype": "bfloat16"},
    {"stage": 3, "lambda1": 0.05, "dtype": "bfloat16"},
]  # fmt: skip
LAYERS = 14
"""Linear layers with adapters: seven in each of two blocks."""


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """Every case, from one start of two ranks."""
    report: list[dict[str, Any]] = run_ranks(f"{JOBS}:run_cases", 2, {"cases": CASES}, timeout=600)[0]
    return report


@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda number: "-".join(map(str, CASES[number].values())))
def test_equals_the_dense_oracle(reports: list[dict[str, Any]], case: int) -> None:
    report, settings = reports[case], CASES[case]
    assert report["changed"] == [], "a frozen adapter has changed"
    assert report["trained"] == [2 * LAYERS] * 3, "not the newest adapter alone was trained"
    assert report["adapters"] == 3
    assert report["still"] == [], "a trained matrix did not move"
    if settings.get("dtype") == "bfloat16":  # the oracle computes in float32
        assert report["apart"] <= 3e-3
        return
    assert report["unpublished"] == 0.0
    assert report["apart"] <= 1e-6


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_every_stage_goes_on_from_the_same_state(tmp_path: Path, dtype: str) -> None:
    arguments = {"folder": str(tmp_path / "state"), "dtype": dtype, "stages": [2, 0, 1, 3]}
    for rank, report in enumerate(run_ranks(f"{JOBS}:through_a_state", 2, arguments, timeout=300)):
        for stage, result in report.items():
            assert result["frozen"] == 2 * 2 * LAYERS
            assert result["not_restored"] == [], f"rank {rank}, stage {stage}"
            assert result["apart"] <= (1e-6 if dtype == "float32" else 1e-3), f"rank {rank}, stage {stage}"


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_masks_cover_the_penalty_that_comes_before_them(stage: int) -> None:
    """Whether MIGU's backward skips rows or zeroes them makes no difference; the order of the methods does."""
    report = run_ranks(f"{JOBS}:compositions", 2, {"stage": stage})[0]
    found = {name: torch.tensor(weights) for name, weights in report.items()}
    for order in ("olora migu", "migu olora"):
        skipped, zeroed = found[f"{order} True"], found[f"{order} False"]
        assert torch.allclose(skipped, zeroed, rtol=1e-5, atol=1e-7), order
    assert not torch.allclose(found["olora migu True"], found["migu olora True"], rtol=1e-3, atol=1e-5)
