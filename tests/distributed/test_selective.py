"""Parts of weights trained as parameters of their own equal a dense run whose other elements are put back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.chosen import Reports, parameters, run_chosen
from tests.ranks import run_ranks

JOBS = "tests.distributed.selective_jobs"
RELEASED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
REGATHERED = {
    "zero_optimization": {
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
    }
}
"""Weights are released after forward, and gathered once more for backward."""
CASES: list[dict[str, Any]] = [
    {"stage": 0, "along": "rows"},
    {"stage": 1, "along": "columns", "accumulation": 3, "clip": 0.1},
    {"stage": 2, "along": "both", "accumulation": 3, "decay": 0.1, "recompute": True},
    {"stage": 3, "along": "both", "accumulation": 3, "clip": 0.1, "recompute": True, "deepspeed": RELEASED},
    {"stage": 3, "along": "both", "clip": 0.1, "decay": 0.1},
    {"stage": 3, "along": "both", "deepspeed": REGATHERED},
    {"stage": 0, "along": "both", "family": "roberta", "clip": 0.1},
    {"stage": 2, "along": "rows", "family": "roberta", "rest": False},
    {"stage": 3, "along": "rows", "family": "roberta", "deepspeed": RELEASED},
    {"stage": 0, "along": "columns", "family": "gpt2", "accumulation": 3},
    {"stage": 0, "along": "columns", "family": "gpt2", "keep": 0.6},
    {"stage": 2, "along": "both", "family": "gpt2", "clip": 0.1},
    {"stage": 3, "along": "columns", "keep": 0.6, "recompute": True, "deepspeed": RELEASED},
    {"stage": 3, "along": "both", "family": "gpt2", "deepspeed": RELEASED},
    {"stage": 2, "along": "both", "family": "t5", "embedding": False},
    {"stage": 3, "along": "both", "family": "t5", "recompute": True, "deepspeed": RELEASED, "embedding": False},
    {"stage": 2, "along": "both", "family": "lora"},
    {"stage": 3, "along": "both", "family": "lora", "deepspeed": RELEASED, "accumulation": 3},
    {"stage": 1, "along": "both", "offload": True, "clip": 0.1},
    {"stage": 3, "along": "both", "offload": True, "clip": 0.1, "deepspeed": RELEASED},
    {"stage": 2, "along": "both", "dtype": "bfloat16", "clip": 0.1},
    {"stage": 3, "along": "both", "dtype": "bfloat16", "deepspeed": RELEASED},
    {"stage": 0, "along": "elements", "clip": 0.1, "decay": 0.1},
    {"stage": 2, "along": "elements", "family": "roberta", "accumulation": 3, "recompute": True},
    {"stage": 3, "along": "elements", "family": "gpt2", "accumulation": 3, "deepspeed": RELEASED},
    {"stage": 1, "along": "elements", "family": "t5", "embedding": False, "offload": True, "clip": 0.1},
    {"stage": 3, "along": "elements", "family": "lora", "decay": 0.1},
    {"stage": 3, "along": "elements", "dtype": "bfloat16", "deepspeed": RELEASED},
    {"stage": 0, "selector": "ssu", "accumulation": 3, "clip": 0.1},
    {"stage": 1, "selector": "ssu", "decay": 0.1},
    {"stage": 2, "selector": "ssu", "accumulation": 3, "family": "gpt2"},
    {"stage": 3, "selector": "ssu", "accumulation": 3, "clip": 0.1, "deepspeed": RELEASED},
    {"stage": 0, "selector": "ssu", "family": "t5"},
    {"stage": 3, "selector": "ssu", "family": "t5", "recompute": True, "deepspeed": RELEASED},
    {"stage": 2, "selector": "ssu", "dtype": "bfloat16", "accumulation": 3, "clip": 0.1},
    {"stage": 3, "selector": "ssu", "dtype": "bfloat16", "deepspeed": RELEASED},
    {"stage": 0, "selector": "s2ft", "accumulation": 3, "clip": 0.1, "decay": 0.1},
    {"stage": 1, "selector": "s2ft", "family": "gpt2"},
    {"stage": 2, "selector": "s2ft", "accumulation": 3, "family": "t5"},
    {"stage": 3, "selector": "s2ft", "accumulation": 3, "clip": 0.1, "deepspeed": RELEASED},
    {"stage": 0, "selector": "s2ft", "family": "roberta"},
]


NEAR = 2**-5
"""In bfloat16, scores hold squares of inputs that were rounded about eight times on their way, by at most 2^-9 each:
columns whose scores are as near to the cut as that may change places."""


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Reports:
    return run_chosen(request, f"{JOBS}:run_cases", CASES)


@pytest.mark.parametrize(("case", "world"), parameters(CASES))
def test_equals_the_dense_oracle(reports: Reports, case: int, world: int) -> None:
    report, settings = reports[world][case], CASES[case]
    exact = settings.get("dtype") != "bfloat16"
    assert report["kept"] > 0
    assert report["trained"] < 0.7 * report["dense"]
    assert report["moved"] == [], "a dropped element moved"
    assert report["still"] == [], "a trained part did not move"
    assert report["flipped"] <= (0.0 if exact else NEAR), "another choice than by the scores"
    assert report["apart"] <= (1e-6 if exact else 2e-2)
    assert report["outputs"] <= (1e-5 if exact else 0.2)


SETTINGS = [{"along": "both"}, {"along": "elements"}, {"selector": "ssu"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda each: next(iter(each.values())))
def test_every_stage_goes_on_from_the_same_state(tmp_path: Path, settings: dict[str, Any]) -> None:
    arguments = {"folder": str(tmp_path / "state"), "stages": [2, 0, 1, 3], "settings": settings}
    apart = run_ranks(f"{JOBS}:through_a_state", 2, arguments, timeout=300)[0]
    assert apart == {"2": 0.0, "0": pytest.approx(0.0, abs=1e-6), "1": 0.0, "3": pytest.approx(0.0, abs=1e-6)}


def test_the_first_rank_chooses_for_all() -> None:
    """Scores may differ in their last bit between unlike processors."""
    first, second = run_ranks(f"{JOBS}:disagreeing", 2, {}, timeout=300)[0]
    assert first == second
    assert {numbers[0] for numbers in first} == {0}


def test_calibration_is_the_same_to_the_last_bit_on_any_number_of_ranks() -> None:
    digests = [run_ranks(f"{JOBS}:calibrated", world, {"stages": [0, 3]}, timeout=300) for world in (1, 2, 3)]
    assert len({each for ranks in digests for rank in ranks for each in rank}) == 1


def test_half_fine_tuning(tmp_path: Path) -> None:
    """Every task freezes another half of the matrices, also after a resume between two tasks."""
    for report in run_ranks(f"{JOBS}:half", 2, {"stages": [0, 2, 3], "folder": str(tmp_path)}, timeout=300)[0]:
        assert report["apart"] <= 1e-6
        assert report["moved"] == []
        assert report["still"] == []
        first, second = ({name for name in frozen if "layers" in name} for frozen in report["frozen"])
        assert first != second
        for frozen in (first, second):
            # Two of four in attention, three of six in both feed-forwards, one of two norms.
            assert [sum(part in name for name in frozen) for part in ("self_attn", "mlp", "norm")] == [4, 3, 2]
        assert report["resumed"] == []
