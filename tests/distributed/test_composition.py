"""MIGU before KIF: importance is that of the masked gradients, whether their rows were skipped or zeroed."""

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
