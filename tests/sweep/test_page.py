from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.report.blocks import Table, Text
from cl_dist.sweep.page import sweep_page, write_page
from tests.sweep.cells import finish, make_grid, matrix, stop_half_way
from tests.sweep.test_tables import results_of


def test_means_deviations_and_what_is_missing(tmp_path: Path) -> None:
    grid = make_grid(tmp_path)
    for cell in grid.cells:
        if cell.method == "sequential":
            finish(cell, matrix(0.75, 0.25 + 0.125 * cell.seed, 1.0))
        elif cell.seed == 0:
            finish(cell, matrix(0.75, 0.5, 1.0))
        else:
            stop_half_way(cell, matrix(0.5, 0.5, 0.5))
    results = results_of(grid, tmp_path)
    page = sweep_page(results, "recipe", [])
    assert page.sections[0].title == "migu forgot least so far"
    rows = [list(row) for row in page.sections[1].blocks[0].rows]  # type: ignore[union-attr]
    assert rows[0][:5] == ["sequential", "own", "2", "0.6562 ± 0.0442", "−0.4375 ± 0.0884"]
    assert rows[1][:4] == ["migu", "own", "1 of 2", "0.7500"]
    runs = next(section for section in page.sections if section.anchor == "runs").blocks[0]
    assert isinstance(runs, Table)
    assert len(runs.rows) == 4
    assert page.sections[-1].blocks[0].items == ["own migu seed1: interrupted, 1 of 2 tasks done"]  # type: ignore[union-attr]
    path = write_page(results, "recipe", tmp_path / "page", ["pdf"])
    names = {file.name for file in path.parent.iterdir()}
    assert names == {"index.html", "methods.png", "methods.pdf", "order_0.png", "order_0.pdf"}


def scored(*metrics: str) -> dict[str, dict[str, str | int]]:
    return {name: {"metric": metric} for name, metric in zip(("spring", "summer"), metrics, strict=True)}


def test_different_scores_are_never_averaged_silently(tmp_path: Path) -> None:
    """In each run the same mixture: the winner is named, with a warning. In one run another: no winner."""
    warning = "Both are means of different scores: look at each task instead."
    for place, other in enumerate(("rouge_l", "exact_match")):
        grid = make_grid(tmp_path / str(place), seeds="0")
        for cell in grid.cells:
            kinds = scored("exact_match", "rouge_l" if cell.method == "sequential" else other)
            finish(cell, matrix(0.75, 0.25 if cell.method == "sequential" else 0.5, 1.0), kinds)
        first = sweep_page(results_of(grid, tmp_path / str(place)), "recipe", []).sections[0]
        texts = [block for block in first.blocks if isinstance(block, Text)]
        assert first.title == ("These runs cannot be compared by their means" if place else "migu forgot least")
        assert texts[0].text.endswith(warning)
        assert any(
            "means of different scores: exact_match (spring); rouge_l (summer)" in item for item in texts[-1].items
        )


def test_methods_that_forget_alike_tie(tmp_path: Path) -> None:
    grid = make_grid(tmp_path)
    for cell in grid.cells:
        finish(cell, matrix(0.75, 0.25, 1.0))
    assert sweep_page(results_of(grid, tmp_path), "recipe", []).sections[0].title == (
        "sequential and migu tie: they forgot equally little"
    )


def test_nothing_is_finished(tmp_path: Path) -> None:
    grid = make_grid(tmp_path)
    results = results_of(grid, tmp_path)
    path = write_page(results, "recipe", tmp_path / "page")
    assert "No method has results yet" in path.read_text()
    assert [file.name for file in path.parent.iterdir()] == ["index.html"]


@pytest.mark.parametrize("orders", ["1,2"])
def test_several_orders_have_a_figure_each(orders: str, tmp_path: Path) -> None:
    from cl_dist.sweep.checks import CellState
    from cl_dist.sweep.results import CellResult, Results, Row

    def row(order: str, method: str, kept: float) -> Row:
        values = {"average_performance": kept, "forgetting": 0.75 - kept}
        scores = matrix(0.75, kept, 0.75)
        return Row(
            order, method, (CellResult(order, method, 0, CellState("finished"), values, None, ("a", "b"), scores),)
        )

    results = Results(tuple(row(f"order{order}", method, 0.25 if method == "x" else 0.5)
                            for order in orders.split(",") for method in ("x", "y")))  # fmt: skip
    page = sweep_page(results, "recipe", [])
    assert page.sections[0].title == "y forgot least"
    assert list(page.sections[1].blocks[0].rows[-1][:2]) == ["y", "mean of orders"]  # type: ignore[union-attr]
    path = write_page(results, "recipe", tmp_path)
    assert {"order_0.png", "order_1.png"} <= {file.name for file in path.parent.iterdir()}
