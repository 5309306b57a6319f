"""MIGU before KIF: importance is that of the masked gradients, whether their rows were skipped or zeroed. And parts
chosen for a task before LwF or A-GEM, against the dense oracle of these with everything else masked.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.ranks import run_ranks

JOB = "tests.distributed.composition_jobs:train"


@pytest.fixture(scope="module", params=[2, pytest.param(3, marks=pytest.mark.slow)], ids=["zero2", "zero3"])
def masked(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same steps with rows skipped in backward and with rows zeroed after the reduction."""
    skipped, zeroed = (
        run_ranks(JOB, 2, {"stage": request.param, "order": ["migu", "kif"], "skip_rows": skip})[0]
        for skip in (True, False)
    )
    return skipped, zeroed


def test_rows_that_were_never_kept_have_no_importance(masked: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for report in masked:
        for name, rows in report["rows"].items():
            untouched = report["untouched_rows"][name]
            # 30 % are kept in each of three steps: at most 90 % are ever touched.
            assert rows - 3 * (rows - int(0.7 * (rows - 1))) <= untouched < rows, name
            assert untouched > 0, name


def test_skipping_and_zeroing_agree(masked: tuple[dict[str, Any], dict[str, Any]]) -> None:
    for quantity in ("smoothed", "weights"):
        skipped, zeroed = (torch.tensor(report[quantity]) for report in masked)
        assert torch.allclose(skipped, zeroed, rtol=1e-5, atol=1e-7), quantity


def test_the_other_order_sees_what_is_not_masked_yet() -> None:
    report = run_ranks(JOB, 1, {"stage": 2, "order": ["kif", "migu"], "skip_rows": False})[0]
    assert all(count == 0 for count in report["untouched_rows"].values())


CHOSEN: list[dict[str, Any]] = [
    {"selector": "ssu", "method": "lwf", "stage": 2, "weight": 3.0, "accumulation": 3, "clip": 0.1},
    {"selector": "ssu", "method": "agem", "stage": 3, "memory_ratio": 1.0, "clip": 0.1},
    {"selector": "s2ft", "method": "lwf", "stage": 3, "weight": 3.0, "top_k": 7},
    {"selector": "s2ft", "method": "agem", "stage": 0, "memory_ratio": 1.0, "memory_batch": 3, "accumulation": 3},
]


@pytest.fixture(scope="module")
def chosen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every case of `CHOSEN`, in one start of the ranks."""
    arguments = {"cases": CHOSEN, "folder": str(tmp_path_factory.mktemp("chosen"))}
    report: dict[str, Any] = run_ranks("tests.distributed.composition_jobs:chosen_parts", 2, arguments, timeout=300)[0]
    return report


@pytest.mark.parametrize("number", range(len(CHOSEN)), ids=lambda number: "-".join(map(str, CHOSEN[number].values())))
def test_what_a_task_trains_has_the_other_methods_gradient(chosen: dict[str, Any], number: int) -> None:
    report, settings = chosen["cases"][number], CHOSEN[number]
    assert report["trained"] <= 1e-6
    assert report["moved"] == 0.0, "a frozen element moved"
    assert report["effect"] > 1e-3
    if settings["method"] == "agem":
        ours, oracles = report["projected"]
        assert ours == oracles > 0


@pytest.mark.parametrize("number", [0, 1], ids=["ssu", "s2ft"])
def test_a_resume_asks_the_old_model_again(chosen: dict[str, Any], number: int) -> None:
    """LwF puts the weights at the start of the task back for that, and the layers have to compute with them."""
    assert chosen["resumed"][number] == 0.0
