from __future__ import annotations

import csv
from collections.abc import Mapping

import pytest

from cl_dist.benchmarks.step_model import (
    MEASURED,
    PAGE,
    PREDICTED,
    RANKS,
    Run,
    kept_share,
    predicted,
    predicted_phases,
    read,
    section,
    seven_billion_shape,
    with_section,
)
from cl_dist.errors import BadInput

KEPT_4096, KEPT_11008 = 1229, 3303
"""Rows at and above the 0.7 quantile."""
BLOCK = 4 * 4096 * 4096 + 3 * 4096 * 11008
KEPT_BLOCK = 4 * KEPT_4096 * 4096 + 2 * KEPT_11008 * 4096 + KEPT_4096 * 11008
REST = 2 * 32000 * 4096 + 65 * 4096
SHARE = (32 * KEPT_BLOCK + REST) / (32 * BLOCK + REST)


def test_the_page_has_the_figures_of_the_file() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert with_section(page, section(read(PREDICTED))) == page


def test_the_file_has_the_figures_of_the_measured_runs() -> None:
    rows = {(row["link"], row["stage"], row["mask"]): row for row in read(PREDICTED) if row["measured_step_ratio"]}
    with MEASURED.open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(rows) == len(lines)
    for line in lines:
        row = rows[line["rate"], line["zero_stage"], line["mask"]]
        assert row["measured_step_ratio"] == line["step_compact_over_dense.median"]
        assert row["measured_bytes_ratio"] == line["bytes_compact_over_dense.median"]


def test_what_the_kept_share_of_llama2_7b_is() -> None:
    assert kept_share(seven_billion_shape("update")) == pytest.approx(SHARE)


def test_the_predictions_are_those_of_the_plan_now() -> None:
    written = [row for row in read(PREDICTED) if (row["nodes"], row["gbit_per_node"], row["stage"]) == ("4", "25", "2")]
    assert [{name: value for name, value in row.items() if value} for row in written] == list(predicted(4, 25, 2))


def test_stage_2_of_7b_by_hand() -> None:
    """32 ranks, 25 Gbit/s: an all-reduce of the gradients and a gather of the weights, both in bfloat16, at 0.7 of the
    network; the arithmetic of 64 x 512 tokens is small beside it."""
    update, gradient = predicted(4, 25, 2)
    sent = 2 * (32 * BLOCK + REST) * 31 / 32  # bytes, once
    assert float(update["dense_gigabytes"]) == pytest.approx(3 * sent / 1e9, rel=2e-3)
    assert float(update["dense_wire_ms"]) == pytest.approx(1e3 * 3 * sent / (0.7 * 25e9 / 8), rel=0.01)
    assert float(update["predicted_bytes_ratio"]) == pytest.approx(SHARE, rel=0.01)
    assert float(gradient["predicted_bytes_ratio"]) == pytest.approx((2 * SHARE + 1) / 3, rel=0.01)
    # Of 36 bytes an element, 28 are AdamW's. The first rank owns the embedding, which has no mask, and is the slowest.
    dropped = 1 - (5 * KEPT_4096 + 2 * KEPT_11008) / (5 * 4096 + 2 * 11008)
    owned = (32 * BLOCK + REST) / 32
    stepped = 1 - 28 / 36 * dropped * (owned - 32000 * 4096) / owned
    assert float(update["predicted_optimizer_ratio"]) == pytest.approx(stepped, rel=2e-3)
    assert float(gradient["predicted_optimizer_ratio"]) == 1


def line(rate: str, mask: str) -> Mapping[str, str]:
    sizes = {"hidden": 64, "intermediate": 176, "heads": 1, "key_value_heads": 1, "layers": 2, "tokens": 8}
    phases = {"forward": 1.0, "backward": 4.0, "optimizer": 2.0, "gather": 1.0}
    return {
        **{name: str(value) for name, value in sizes.items()},
        **{f"phases.{phase}.dense.median": str(seconds) for phase, seconds in phases.items()},
        "threshold": "0.7",
        "dtype": "float32",
        "rate": rate,
        "mask": mask,
        "zero_stage": "2",
    }


def test_phases_shrink_by_what_they_are_made_of() -> None:
    """The reduction of 2 MB over 1 MB/s takes two of backward's four seconds; the gather has half of its bytes."""
    dense, half = ({"gradients": 2 * each, "updated weights": each} for each in (1_000_000, 500_000))
    slow, free = (predicted_phases(Run(line(rate, "update")), dense, half) for rate in ("8mbit", "unshaped"))
    assert slow["forward"] == 1
    tracked, kept = 2 * (4 * 64 * 64 + 3 * 64 * 176), 2 * (4 * 19 * 64 + 2 * 53 * 64 + 19 * 176)
    rest = 2 * 1024 * 64 + 5 * 64
    assert slow["optimizer"] == pytest.approx(2 * (kept + rest) / (tracked + rest))
    assert slow["gather"] == 0.5
    assert 1 + 2 / 2 < slow["backward"] < 1 + 2  # of the products, at most those of weights shrink, which are half
    assert free == slow  # the gather's bytes took a second, so the link's speed was the same
    gradient = predicted_phases(Run(line("8mbit", "gradient")), dense, {**half, "updated weights": 1_000_000})
    assert (gradient["optimizer"], gradient["gather"]) == (2, 1)
    assert gradient["backward"] == pytest.approx(slow["backward"])
    assert RANKS == 2


def test_a_page_without_markers_is_refused() -> None:
    with pytest.raises(BadInput, match="the page needs one line"):
        with_section("no markers", "text")
