"""Runs of many tasks: pictures, page and output grow with the number of tasks, not with its square."""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cl_dist.progress import WIDEST_MATRIX, format_matrix
from cl_dist.report import pictures
from cl_dist.report.drawing import DPI, NUMBERED, TALL, WIDE, Picture, draw
from cl_dist.report.units import correlation
from cl_dist.report.write import write_report
from tests.report.runs import write_run
from tests.report.test_pictures import opened, results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN: dict[str, Callable[[list[str]], Picture]] = {
    "accuracy_matrix": lambda names: pictures.accuracy_matrix(names, scores(len(names))),
    "scores": lambda names: pictures.scores(names, scores(len(names))),
    "loss": lambda names: pictures.loss(names, {name: {step: 1 / step for step in range(1, 30)} for name in names}),
    "unit_importance": lambda names: pictures.unit_importance(names, results(len(names), 2)),
    "task_correlation": lambda names: pictures.task_correlation(names, correlation(results(len(names), 2).importance)),
    "fusion": lambda names: pictures.fusion(names, results(len(names), 2)),
}


def scores(tasks: int) -> list[list[float]]:
    draws = random.Random(0)
    return [[draws.random() for _ in range(tasks)] for _ in range(tasks + 1)]


def names(tasks: int) -> list[str]:
    return [f"task-of-a-long-name-{number}" for number in range(tasks)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of artists (texts, lines, patches) that matplotlib draws for each picture."""
    counts: list[int] = []

    def count(size: tuple[float, float], paint: Callable[[Figure], None]) -> Picture:
        def paint_and_count(figure: Figure) -> None:
            paint(figure)
            counts.append(len(figure.findobj()))

        return draw(size, paint_and_count)

    monkeypatch.setattr(pictures, "draw", count)
    return counts


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_of_many_tasks_has_its_size_and_no_more_parts_than_one_of_few(name: str, drawn: list[int]) -> None:
    """Sixteen times the cells of a picture that still has a number in each, drawn from no more parts than four times
    as many rows and columns have."""
    for tasks in (NUMBERED, 4 * NUMBERED):
        image = opened(DRAWN[name](names(tasks)))
        assert image.shape[0] <= (TALL + 3) * DPI
        assert image.shape[1] <= (WIDE + 4) * DPI
    few, many = drawn
    assert many < 4 * few


def test_five_hundred_tasks(tmp_path: Path) -> None:
    """The whole report; what does not fit on the page is in a file."""
    folder = write_run(tmp_path / "run", names(500), 300)
    report = write_report(folder.path)
    assert report.files == (
        "index.html",
        "report.md",
        "accuracy_matrix.png",
        "scores.png",
        "accuracy_matrix.csv",
        "loss.png",
    )
    assert (folder.report / "report.md").stat().st_size < 100_000
    assert (folder.report / "index.html").stat().st_size < 2_000_000
    with (folder.report / "accuracy_matrix.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 301
    matrix = report.run.manifest.accuracy_matrix
    assert float(rows[7][names(500)[3]]) == matrix[7][3]
    page = (folder.report / "report.md").read_text()
    assert f"| {names(500)[3]} | {matrix[4][3]:.4f} | {matrix[300][3]:.4f} |" in page
    assert "and 175 more." in page


def test_many_tasks_are_printed_with_a_line_each() -> None:
    many = names(WIDEST_MATRIX + 1)
    matrix = scores(len(many))[:4]
    lines = format_matrix(many, matrix).splitlines()
    assert len(lines) == len(many) + 1
    assert lines[3].split() == [many[2], f"{matrix[3][2]:.4f}", f"{matrix[3][2]:.4f}"]
    assert lines[4].split() == [many[3], "-", f"{matrix[3][3]:.4f}"]
    assert len(format_matrix(many[:-1], [row[:-1] for row in matrix]).splitlines()) == len(matrix) + 1
