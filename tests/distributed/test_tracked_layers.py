"""MIGU on layers that are no nn.Linear, and on outputs that are not (batch, length): equal to plain PyTorch."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_exactness import FLOAT32_BOUND, RELEASED
from tests.ranks import run_ranks

EXPERTS = ("mixtral", "qwen3moe", "gptoss")
CASES: list[dict[str, Any]] = [
    # Skipped in backward, on the shards, and with the rows that are not kept frozen.
    *({"name": name, "stage": stage} for name in EXPERTS for stage in (2, 3)),
    *({"name": name, "stage": stage, "accumulation": 3} for name in EXPERTS for stage in (2, 3)),
    *({"name": name, "stage": stage, "mask": "update"} for name in EXPERTS for stage in (2, 3)),
    {"name": "mixtral", "stage": 3, "skip": False, "recompute": True, "deepspeed": RELEASED},
    {"name": "gptoss", "stage": 3, "recompute": True, "deepspeed": RELEASED},
    {"name": "gptoss", "stage": 2, "accumulation": 3, "mask": "update"},
    {"name": "qwen3moe", "stage": 0},
    {"name": "qwen2moe", "stage": 2},
    *({"name": "gpt2", "stage": stage} for stage in (0, 3)),
    {"name": "gpt2", "stage": 2, "accumulation": 3, "mask": "update"},
    {"name": "gpt2", "stage": 3, "skip": False, "mask": "update", "deepspeed": RELEASED},
    {"name": "opt", "stage": 2},
    {"name": "opt", "stage": 3, "accumulation": 3, "mask": "update"},
    {"name": "deberta", "stage": 2},
    {"name": "deberta-v3", "stage": 2, "recompute": True},
    {"name": "mamba", "stage": 2, "untracked": "dense"},
    {"name": "mamba", "stage": 3, "untracked": "dense", "accumulation": 3},
]


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    """What two ranks say of all cases."""
    found: list[dict[str, Any]] = run_ranks(
        "tests.distributed.tracked_jobs:run_cases", 2, {"cases": CASES}, timeout=600
    )[0]
    return found


@pytest.mark.parametrize("case", range(len(CASES)), ids=["-".join(map(str, case.values())) for case in CASES])
def test_equals_the_dense_oracle(reports: list[dict[str, Any]], case: int) -> None:
    report = reports[case]
    assert report["rows"] > 0
    assert report["flips"] == 0, "other rows were kept than the oracle keeps"
    assert report["moved_wrong"] == 0, "an element of a row that is not kept moved in the first step"
    assert report["frozen_moved"] == 0, "mask: update let an element of a dropped row move"
    assert report["error"] <= FLOAT32_BOUND
    assert report["exp_avg"] <= 1e-6
    assert report["exp_avg_sq"] <= 2e-6
    if CASES[case]["name"] != "mamba":
        assert report["unmasked"] == [], "a matrix in the blocks was trained without a mask"


@pytest.mark.parametrize("name", EXPERTS)
def test_exactly_the_kept_share_of_every_expert_s_rows_moves(reports: list[dict[str, Any]], name: str) -> None:
    for report, case in zip(reports, CASES, strict=True):
        if case["name"] != name:
            continue
        groups = [group for of_weight in report["groups"].values() for group in of_weight]
        assert len(report["groups"]) == 2 * 2 * (2 if name == "gptoss" else 1)  # two blocks, two projections, biases
        assert all(kept in (0, rows - -(-7 * (rows - 1) // 10)) for kept, rows in groups)
        assert sum(kept > 0 for kept, _ in groups) > len(groups) // 2


def test_what_cannot_be_measured_is_refused_by_name() -> None:
    message = run_ranks("tests.distributed.tracked_jobs:refusals", 2, {"names": ["mamba"]}, timeout=120)[1]["mamba"]
    assert message.startswith("method.untracked: ")
    for part in ("dt_proj.weight (its forward does not run)", "conv1d.weight", "A_log", "% of the trainable", "dense"):
        assert part in message
    assert "in_proj" not in message


def test_dense_says_what_is_not_masked(reports: list[dict[str, Any]]) -> None:
    number = next(number for number, case in enumerate(CASES) if case["name"] == "mamba")
    report = reports[number]
    parts = {name.split("mixer.")[1] for name in report["unmasked"]}
    assert parts == {"dt_proj.weight", "conv1d.weight", "A_log"}
    assert all(part in report["message"] for part in parts)
