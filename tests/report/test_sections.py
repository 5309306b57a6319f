"""What is on the page of a run, as blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from cl_dist.report.blocks import Cell, Details, Facts, Section, Table, Text
from cl_dist.report.flips import read_flips
from cl_dist.report.kept_rows import read_kept_rows
from cl_dist.report.reading import read_run
from cl_dist.report.sections import SECTIONS, Contents, forgot_least, headline, run_page, scale, top_units
from cl_dist.state.manifest import Manifest
from tests.report.demo import TASKS, forgetful, migu_run, write_demo


@pytest.fixture(scope="module")
def contents(tmp_path_factory: pytest.TempPathFactory) -> Contents:
    folder = migu_run(tmp_path_factory.mktemp("sections") / "run")
    run = read_run(folder.path)
    folders = [folder.task(position, name) for position, name in enumerate(run.done)]
    return Contents(run, None, *read_flips(run), read_kept_rows(run.done, folders), ["report.md"], ["nothing"])


def section(contents: Contents, anchor: str) -> Section:
    return next(each for each in run_page(contents).sections if each.anchor == anchor)


def table(contents: Contents, anchor: str) -> Table:
    return next(block for block in section(contents, anchor).blocks if isinstance(block, Table))


def test_every_section_is_on_the_page_once(contents: Contents) -> None:
    page = run_page(contents)
    anchors = [each.anchor for each in page.sections]
    first = ["summary", "matrix", "stream", "samples", "metrics", "scoring"]
    assert anchors == [*first, "kept-rows", "training", "recipe", "missing"]
    assert len(SECTIONS) == len(anchors) + 2  # general ability and skill units, which this run has not
    assert (page.title, page.subtitle) == ("run", "migu · 8 tasks · finished")


def test_the_summary_has_the_metrics_and_each_task_then_and_now(contents: Contents) -> None:
    matrix = forgetful(8, 0.08)
    facts = next(block for block in section(contents, "summary").blocks if isinstance(block, Facts))
    values = {fact.name: fact.value for fact in facts.facts}
    earlier = [max(row[task] for row in matrix[1:8]) - matrix[8][task] for task in range(7)]
    assert values["Forgetting"] == f"{sum(earlier) / 7:.3f}"
    assert values["Average performance"] == f"{sum(matrix[8]) / 8:.3f}"
    first = table(contents, "summary").rows[0]
    assert first[:3] == ["yelp", f"{matrix[1][0]:.4f}", f"{matrix[8][0]:.4f}"]
    assert first[3] == Cell(f"−{matrix[1][0] - matrix[8][0]:.4f}", tone="bad")
    assert first[4] == Cell("", span=(matrix[1][0], matrix[8][0]), tone="bad")


@pytest.mark.parametrize(
    ("done", "moved", "said"),
    [
        (0, None, "No task is finished yet"),
        (1, None, "One task is finished, so there is nothing to forget yet"),
        (2, -0.25, "Scores on the first task fell by 0.250 after their training"),
        (4, 0.125, "Scores on the first 3 tasks rose by 0.125 on average after their training"),
        (4, 0.0001, "Nothing forgotten: scores on the first 3 tasks are what they were right after their training"),
        (4, None, "How much of the first 3 tasks was forgotten is unknown: scores are missing or mean nothing here"),
    ],
)
def test_the_headline(done: int, moved: float | None, said: str) -> None:
    assert headline(done, {"backward_transfer": moved}) == said


def test_the_matrix_has_colours_and_frames(contents: Contents) -> None:
    rows = table(contents, "matrix").rows
    matrix = forgetful(8, 0.08)
    assert rows[2][1] == Cell(f"{matrix[2][0]:.3f}", heat=matrix[2][0])
    assert rows[2][2] == Cell(f"{matrix[2][1]:.3f}", heat=matrix[2][1], own=True)
    assert [cell.own for cell in rows[0][1:] if isinstance(cell, Cell)] == [False] * 8


def test_scores_that_are_not_shares_have_their_own_scale() -> None:
    assert scale([[0.25, None], [1.0, 0.5]]) == (0.0, 1.0)
    assert scale([[-6.0], [-2.0]]) == (-6.0, -2.0)
    assert scale([[3.0]]) == (3.0, 4.0)
    assert scale([]) == (0.0, 1.0)


def test_different_scores_are_never_averaged_silently(tmp_path: Path) -> None:
    """AP by kind of score, a warning beside every mean, and a scale of colours for each kind."""
    folder = write_demo(tmp_path / "run", "migu", ("a", "prose", "b"))
    manifest = Manifest.read(folder.manifest)
    rows = ((0.0, -6.0, 0.5), (1.0, -6.0, 0.5), (0.75, -3.0, 0.5), (0.5, -4.5, 1.0))
    scoring = {**manifest.scoring, "prose": {"metric": "log_likelihood", "scored_on": "test"}}
    replace(manifest, accuracy_matrix=rows, scoring=scoring).write(folder.manifest)
    contents = Contents(read_run(folder.path), None, [], {}, None, [], [])
    shown = section(contents, "summary")
    assert (
        shown.title == "Scores on the first 2 tasks fell by 1.000 on average over different scores after their training"
    )
    facts = next(block for block in shown.blocks if isinstance(block, Facts))
    assert all(fact.note.endswith("; here of different scores") for fact in facts.facts)
    warning = next(block for block in shown.blocks if isinstance(block, Text))
    assert warning.text.endswith("Average performance by kind of score: exact_match 0.750, log_likelihood −4.500.")
    then_and_now = table(contents, "summary")
    assert then_and_now.header[-1] == "○ then, ● now (a scale for each kind of score)"
    assert [cell.span for row in then_and_now.rows if isinstance(cell := row[4], Cell)] == [(1, 0.5), (1, 0.5), (1, 1)]
    heat = [[cell.heat for cell in row if isinstance(cell, Cell)] for row in table(contents, "matrix").rows]
    assert heat == [[0.0, 0.0, 0.5], [1.0, 0.0, 0.5], [0.75, 1.0, 0.5], [0.5, 0.5, 1.0]]
    metrics = table(contents, "metrics").rows
    assert [row[:2] for row in metrics[1:3]] == [
        ["average_performance (exact_match)", "0.7500"],
        ["average_performance (log_likelihood)", "−4.5000"],
    ]
    assert str(metrics[0][2]).endswith("Here the mean of different scores.")


def test_the_device_is_readable(tmp_path: Path) -> None:
    folder = write_demo(tmp_path / "run", "migu", ("a",))
    device = {"kind": "cpu", "memory_bytes": 3 << 29, "bfloat16": True}
    replace(Manifest.read(folder.manifest), device=device).write(folder.manifest)
    rows = table(Contents(read_run(folder.path), None, [], {}, None, [], []), "training").rows
    assert rows[2:5] == [["device: kind", "cpu"], ["device: memory", "1.5 GiB"], ["device: bfloat16", "yes"]]


def test_samples_that_changed(contents: Contents) -> None:
    rows = table(contents, "samples").rows
    assert [row[0] for row in rows] == list(TASKS[:-1])
    flips = contents.flips[0]
    counts = [flips.right_to_wrong, flips.wrong_to_right, flips.still_right, flips.still_wrong]
    assert sum(counts) == 40
    assert [getattr(cell, "text", cell) for cell in rows[0][1:6]] == ["40", *map(str, counts)]
    assert flips.right_to_wrong > flips.wrong_to_right


def test_kept_rows(contents: Contents) -> None:
    kept = contents.kept
    assert kept is not None
    layers, overlap = (block for block in section(contents, "kept-rows").blocks if isinstance(block, Table))
    assert layers.rows[1][:3] == ["amazon", "60", f"{np.average(kept.kept[1], weights=kept.rows):.3f}"]
    assert overlap.rows[1][3] == Cell(f"{kept.overlap[1, 2]:.2f}", heat=pytest.approx(kept.overlap[1, 2]))


def test_metrics_that_mean_nothing_are_left_out(tmp_path: Path) -> None:
    run = read_run(write_demo(tmp_path / "run", "per_task").path)
    contents = Contents(run, None, [], {}, None, [], [])
    assert section(contents, "summary").title.startswith("How much of the first 7 tasks was forgotten is unknown")
    values = {str(row[0]): row[1] for row in table(contents, "metrics").rows}
    assert values["forgetting"] == "–"
    assert values["learning_accuracy"] != "–"


def test_many_tasks_are_folded(tmp_path: Path) -> None:
    names = tuple(f"task{number}" for number in range(30))
    run = read_run(write_demo(tmp_path / "run", "migu", names).path)
    contents = Contents(run, None, [], {}, None, [], [])
    worst = table(contents, "summary")
    assert len(worst.rows) == 8
    lost = [float(cell.text.replace("−", "-")) for row in worst.rows if isinstance(cell := row[3], Cell)]
    assert lost == sorted(lost)
    assert any(isinstance(block, Details) and len(block.blocks[0].rows) == 30  # type: ignore[union-attr]
               for block in section(contents, "summary").blocks)  # fmt: skip


def test_a_nan_is_no_score(contents: Contents) -> None:
    rows = tuple(tuple(float("nan") for _ in row) for row in contents.matrix)
    manifest: Manifest = replace(contents.run.manifest, accuracy_matrix=rows)
    broken = replace(contents, run=replace(contents.run, manifest=manifest))
    assert {cell.text for row in table(broken, "matrix").rows for cell in row if isinstance(cell, Cell)} == {"–"}
    assert "unknown" in section(broken, "summary").title


def test_the_most_important_units() -> None:
    assert top_units(np.array([0.5, np.nan, 1.0]), ["a", "b", "c"]) == "c 1, a 0.5"
    assert top_units(np.array([0.5, 0.5]), ["a", "b"]) == "all the same"
    assert top_units(np.array([np.nan]), ["a"]) == "unknown: no score is a number"


def test_who_forgot_least() -> None:
    assert forgot_least({"migu": 0.1, "kif": 0.2}) == "migu forgot least"
    assert forgot_least({"alone": 0.1}) == "alone forgot least"
    # Means over seeds may differ in their last bit.
    tied = {"migu": 0.1 + 0.2, "kif": 0.3}
    assert forgot_least(tied) == "migu and kif tie: they forgot equally little"
    assert forgot_least({**tied, "sequential": 0.4}) == "migu and kif tie: they forgot least, and equally little"
