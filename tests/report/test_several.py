from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.report.blocks import Cell, Table
from cl_dist.report.several import compared, default_folder, labels, read_several, several_page
from cl_dist.report.write import write_report, write_several
from tests.report.demo import write_demo


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run that forgets much, one that forgets little, and one on fewer tasks."""
    folder = tmp_path_factory.mktemp("several")
    return [
        write_demo(folder / "plain", "sequential", ("a", "b", "c"), loss=0.3).path,
        write_demo(folder / "migu", "migu", ("a", "b", "c"), loss=0.02).path,
        write_demo(folder / "short", "migu", ("a", "b"), loss=0.02).path,
    ]


def test_names_are_as_long_as_it_takes() -> None:
    assert labels([Path("/runs/a"), Path("/runs/b")]) == ["a", "b"]
    assert labels([Path("/x/seed0"), Path("/y/seed0")]) == ["x/seed0", "y/seed0"]


def test_numbers_are_compared_with_the_first() -> None:
    assert compared([0.5, 0.75, None]) == ["0.5000", Cell("0.7500 (+0.2500)", tone="good"), "–"]
    assert compared([0.5, 0.75], "forgetting")[1] == Cell("0.7500 (+0.2500)", tone="bad")


def test_the_page(runs: list[Path]) -> None:
    page = several_page(read_several(runs[:2]), [])
    assert page.sections[0].title == "migu forgot least"
    settings = next(block for block in page.sections[-1].blocks if isinstance(block, Table))
    assert list(settings.rows[0]) == ["method.0.name", "sequential", "migu"]
    different = several_page(read_several(runs), [])
    assert any("do not compare" in getattr(block, "text", "") for block in different.sections[0].blocks)


def test_it_is_written_beside_the_runs(runs: list[Path]) -> None:
    page = write_several(runs[:2])
    assert page == runs[0].parent / "report" / "index.html" == default_folder(runs) / "index.html"
    first = {path.name: path.read_bytes() for path in page.parent.iterdir()}
    assert set(first) == {"index.html", "means.png", "losses.png"}
    write_several(runs[:2])
    assert {path.name: path.read_bytes() for path in page.parent.iterdir()} == first
    assert not (runs[0] / "report").exists()


def test_figures_for_papers(runs: list[Path], tmp_path: Path) -> None:
    report = write_report(runs[0], tmp_path, ("pdf", "svg"))
    assert {"scores.png", "scores.svg", "scores.pdf", "loss.svg"} <= set(report.files)
    assert (tmp_path / "scores.pdf").read_bytes().startswith(b"%PDF")


def test_bad_input(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is given twice"):
        read_several([runs[0], runs[1], runs[0]])
    with pytest.raises(BadInput, match="13 runs do not fit on one page; give at most 12"):
        read_several([tmp_path / str(number) for number in range(13)])
    with pytest.raises(BadInput, match="no such folder"):
        write_several([runs[0], tmp_path / "absent"])
    with pytest.raises(BadInput, match="is a run folder"):
        write_several(runs[:2], runs[2])
