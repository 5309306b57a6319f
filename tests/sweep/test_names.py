"""The options of `cl-dist compare` one by one; test_grid has whole command lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.sweep.names import (
    MethodChoice,
    OrderChoice,
    Problems,
    order_label,
    parse_methods,
    parse_orders,
    parse_seeds,
)


def test_methods_compose_have_names_and_their_own_settings() -> None:
    problems = Problems()
    found = parse_methods("kif, both=kif+migu", ["both:method.1.threshold=0.5"], problems)
    problems.check()
    assert found == [
        MethodChoice("kif", ("kif",)),
        MethodChoice("both", ("kif", "migu"), ("method.1.threshold=0.5",)),
    ]


def test_orders_are_published_or_folders(tmp_path: Path) -> None:
    (tmp_path / "my order").mkdir()
    problems = Problems()
    found = parse_orders(f"1,superni-2,{tmp_path}/my order", problems)
    problems.check()
    assert found[:2] == [OrderChoice("order1", "1"), OrderChoice("superni-2", "superni-2")]
    assert found[2] == OrderChoice("my-order", str(tmp_path / "my order"))
    assert order_label(None) == "own"


def test_seeds_are_numbers_below_two_to_the_31st() -> None:
    problems = Problems()
    assert parse_seeds("0, 7,2147483648,x,7", problems) == [0, 7, 7]
    with pytest.raises(BadInput) as caught:
        problems.check()
    assert [text.partition("; ")[0] for text in str(caught.value).splitlines()] == [
        '--seeds: "2147483648" is not a seed',
        '--seeds: "x" is not a seed',
        "--seeds: 7 is given twice",
    ]


def test_a_problem_is_reported_once() -> None:
    problems = Problems()
    problems.check()
    for text in ("a", "b", "a"):
        problems.add(text)
    with pytest.raises(BadInput, match=r"\Aa\nb\Z"):
        problems.check()
