"""LISA and sparse memory fine-tuning update the same rows, to the same weights, as a dense run on one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.chosen import Reports, by_world, run_by_world
from tests.distributed.rows_jobs import STEPS
from tests.ranks import run_ranks

JOBS = "tests.distributed.rows_jobs"
RELEASED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
TRAINED: dict[str, Any] = {"rest": "trained", "mask": "gradient"}
CASES: dict[int, list[dict[str, Any]]] = {
    1: [
        {"method": "lisa", "stage": 0, "accumulation": 3, "clip": 0.1, "decay": 0.1},
        {"method": "lisa", "stage": 3, "deepspeed": RELEASED},
        {"method": "sparse_memory", "stage": 0, "decay": 0.1},
        {"method": "sparse_memory", "stage": 1, "accumulation": 3},
    ],
    2: [
        {"method": "lisa", "stage": 0, "family": "roberta"},
        {"method": "lisa", "stage": 1, "accumulation": 3, "decay": 0.1, "family": "lora"},
        {"method": "lisa", "stage": 1, "offload": True, "accumulation": 3, "clip": 0.1},
        {"method": "lisa", "stage": 2, "clip": 0.1, "recompute": True, "family": "t5"},
        {"method": "lisa", "stage": 2, "dtype": "bfloat16", "decay": 0.1},
        {"method": "lisa", "stage": 3, "accumulation": 3, "clip": 0.1, "decay": 0.1, "deepspeed": RELEASED},
        {"method": "lisa", "stage": 3, "recompute": True, "offload": True, "deepspeed": RELEASED},
        {"method": "sparse_memory", "stage": 0, "accumulation": 3, "settings": TRAINED, "clip": 0.1, "decay": 0.1},
        {"method": "sparse_memory", "stage": 1, "family": "roberta", "clip": 0.1},
        {"method": "sparse_memory", "stage": 2, "decay": 0.1, "offload": True, "settings": {"rows": 100}},
        {"method": "sparse_memory", "stage": 3, "accumulation": 3, "decay": 0.1, "deepspeed": RELEASED},
        {"method": "sparse_memory", "stage": 3, "family": "t5", "settings": {"rest": "trained"}, "recompute": True},
    ],
}
STATES = [
    {"method": "lisa", "stages": [3, 3], "decay": 0.1},
    {"method": "lisa", "stages": [1, 0], "accumulation": 3},
    {"method": "sparse_memory", "stages": [2, 2], "decay": 0.1},
    {"method": "sparse_memory", "stages": [0, 3], "settings": TRAINED},
]
BAD = [
    {"method": "lisa", "stage": 2, "kind": "loss", "decay": 0.1},
    {"method": "sparse_memory", "stage": 3, "kind": "loss", "settings": TRAINED},
]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    return run_by_world(request, f"{JOBS}:run_cases", CASES)


@pytest.mark.parametrize(("world", "case"), by_world(CASES))
def test_equals_the_dense_oracle(reports: Reports, world: int, case: int) -> None:
    report, settings = reports[world][case], CASES[world][case]
    exact = settings.get("dtype") != "bfloat16"
    assert report["moved"] == [], "a row moved, or a moment of it, that was not chosen"
    assert report["still"] == [], "a chosen row did not move"
    assert report["computed"] == [], "a gradient was computed for a block that rests, or none for another one"
    assert report["apart"] <= (STEPS * 2**-23 if exact else 6e-2)
    assert report["weights"] <= (STEPS * 2**-23 if exact else 6e-2)
    assert report["moments"] <= (1e-6 if exact else 2e-2)
    assert report["share"] == pytest.approx(report["expected share"], rel=1e-9)


def test_goes_on_from_a_saved_state(tmp_path: Path) -> None:
    """Bit for bit under the same stage, and up to rounding under another."""
    for report in run_ranks(f"{JOBS}:through_states", 2, {"cases": STATES, "folder": str(tmp_path)}, timeout=300)[0]:
        assert report["differs"] == []
        assert report["shares"][0] == report["shares"][1] < 1


def test_a_skipped_step_leaves_no_trace() -> None:
    for report in run_ranks(f"{JOBS}:past_a_nan", 2, {"cases": BAD}, timeout=300)[0]:
        assert "is nan" in report["skipped"]
        assert report["changed"] == []
        assert report["differs"] == []


def test_tables_that_tokens_do_not_look_up_are_refused() -> None:
    positions, offsets = run_ranks(
        f"{JOBS}:refused",
        1,
        {
            "cases": [
                {"method": "sparse_memory", "stage": 0, "family": family, "settings": {"parameters": [pattern]}}
                for family, pattern in (("gpt2", "*wpe*"), ("t5", "encoder*relative_attention_bias*"))
            ]
        },
    )[0]
    assert positions.startswith("method.parameters: uses of transformer.wpe.weight cannot be counted: ")
    assert offsets.startswith(
        "method.parameters: uses of encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    )
