"""IncLoRA and O-LoRA on ZeRO shards equal a dense oracle; old adapters never move, and come back from a state."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

JOBS = "tests.distributed.growth_jobs"
FAST: list[dict[str, Any]] = [
    {"stage": 0, "lambda1": 0.05, "lambda2": 0.02},
    {"stage": 2, "lambda1": 0.05, "clip": 0.1},
    {"stage": 3, "lambda1": 0.05, "lambda2": 0.02, "accumulation": 3},
    {"stage": 3, "lambda1": 0.05, "dtype": "bfloat16"},
    {"stage": 3, "lambda1": 0.05, "by_task": {"t1": {"lambda1": 0, "lambda2": 0.1}, "t2": {"lambda1": 0.2}}},
]
SLOW: list[dict[str, Any]] = [
    {"stage": 1, "lambda1": 0.05, "accumulation": 3},
    {"stage": 2, "lambda1": 0.0, "lambda2": 0.1},
    {"stage": 2, "lambda1": 0.0, "lambda2": 0.0},
    {"stage": 2, "lambda1": 0.05, "offload": True, "clip": 0.1},
    {"stage": 3, "lambda1": 0.05, "clip": 0.1,
     "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}},
    {"stage": 3, "lambda1": 0.05, "offload": True, "clip": 0.1},
    {"stage": 0, "lambda1": 0.05, "dtype": "bfloat16"},
    {"stage": 2, "lambda1": 0.05, "dtype": "bfloat16"},
]  # fmt: skip
CASES = {"fast": FAST, "slow": SLOW}
LAYERS = 14
"""Linear layers with adapters: seven in each of two blocks."""


@cache
def reports(speed: str) -> list[dict[str, Any]]:
    """Every case of one speed, from one start of two ranks."""
    result: list[dict[str, Any]] = run_ranks(f"{JOBS}:run_cases", 2, {"cases": CASES[speed]}, timeout=900)[0]
    return result


@pytest.mark.parametrize(
    ("speed", "number"),
    [
        pytest.param(
            speed,
            number,
            marks=pytest.mark.slow if speed == "slow" else (),
            id="-".join(map(str, settings.values())),
        )
        for speed, cases in CASES.items()
        for number, settings in enumerate(cases)
    ],
)
def test_equals_the_dense_oracle(speed: str, number: int) -> None:
    report, settings = reports(speed)[number], CASES[speed][number]
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
    report = run_ranks(f"{JOBS}:compositions", 2, {"stage": stage}, timeout=300)[0]
    skipped, zeroed, penalty_last = (torch.tensor(report[name]) for name in ("skipped", "zeroed", "penalty last"))
    assert torch.allclose(skipped, zeroed, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(skipped, penalty_last, rtol=1e-3, atol=1e-5)


def test_lwf_and_agem_see_the_old_model_behind_a_rebuilt_engine() -> None:
    """The old adapters stay active: the responses are those of the task before, until the new adapter has learnt."""
    for report in run_ranks(f"{JOBS}:guarded", 2, {"stages": [0, 2, 3]}, timeout=300):
        for found in report:
            assert found["responses"] <= 1e-5
            assert found["moved"] >= 1e-3, "nothing to guard: the outputs do not change"
            assert found["reference"] <= 1e-5
