from __future__ import annotations

import math

from cl_dist.report.blocks import Cell, change, number


def test_numbers() -> None:
    assert [number(value) for value in (0.5, -0.25, -0.00001, 0.0, None, math.nan)] == [
        "0.5000", "−0.2500", "0.0000", "0.0000", "–", "–",
    ]  # fmt: skip
    assert number(0.12345, 3) == "0.123"


def test_a_change_has_its_sign_and_says_whether_it_is_good() -> None:
    assert change(0.25) == Cell("+0.2500", tone="good")
    assert change(-0.25) == Cell("−0.2500", tone="bad")
    assert change(-0.25, more_is_better=False).tone == "good"
    assert change(0.00001) == Cell("0.0000")
    assert change(None) == change(math.nan) == Cell("–")
