from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.report.blocks import Cell, Table, Text
from cl_dist.report.several import compared, default_folder, labels, read_several, several_page
from cl_dist.report.write import write_report, write_several
from cl_dist.state.manifest import Manifest
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
    metrics = next(block for block in page.sections[1].blocks if isinstance(block, Table))
    assert any(isinstance(cell, Cell) for row in metrics.rows for cell in row)


def reasons(runs: list[Path]) -> list[str]:
    """Why runs cannot be compared, after checks that the page makes no claim then."""
    page = several_page(read_several(runs), [])
    assert page.sections[0].title == "These runs cannot be compared by their means"
    metrics = next(block for block in page.sections[1].blocks if isinstance(block, Table))
    assert metrics.caption == "Each metric by run"
    assert all(isinstance(cell, str) and "(" not in cell for row in metrics.rows for cell in row)
    return [item for block in page.sections[0].blocks if isinstance(block, Text) for item in block.items]


def test_other_tasks_do_not_compare(runs: list[Path]) -> None:
    assert [reason[:54] for reason in reasons(runs)] == ["The runs have not finished the same tasks in the same "]


def test_other_scores_do_not_compare(runs: list[Path], tmp_path: Path) -> None:
    """The score itself and the means over it; a task that both score in the same way compares."""
    other = write_demo(tmp_path / "other", "migu", ("a", "b", "c"), loss=0.02)
    manifest = Manifest.read(other.manifest)
    scoring = {**manifest.scoring, "b": {"metric": "rouge_l", "scored_on": "train"}}
    replace(manifest, scoring=scoring).write(other.manifest)
    both = [runs[0], other.path]
    said = reasons(both)
    assert said[0].startswith("The runs score b in different ways")
    assert said[1:] == [
        "other: the metrics are means of different scores: exact_match (a, c); rouge_l (b).",
        "other: scored on training data: b.",
    ]
    tasks = next(section for section in several_page(read_several(both), []).sections if section.anchor == "tasks")
    table = next(block for block in tasks.blocks if isinstance(block, Table))
    assert [isinstance(row[2], Cell) for row in table.rows] == [True, False, True]


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
