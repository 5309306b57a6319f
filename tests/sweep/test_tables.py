from __future__ import annotations

import csv
import io
import json
import math
from pathlib import Path

import pytest

from cl_dist.sweep.checks import CellState
from cl_dist.sweep.folder import SweepFolder
from cl_dist.sweep.grid import Grid
from cl_dist.sweep.results import METRICS, CellResult, Results, Row, read_results
from cl_dist.sweep.tables import csv_table, escape_latex, latex_table, markdown_page, render_tables
from tests.sweep.cells import finish, make_grid, matrix, stop_half_way

SCORES = {
    ("sequential", 0): matrix(0.75, 0.25, 1.0),
    ("sequential", 1): matrix(0.5, 0.375, 0.875),
    ("migu", 0): matrix(0.625, 0.5, 0.75),
}


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    """Two methods, two seeds; the second seed of the second method is half-way."""
    grid = make_grid(tmp_path)
    for cell in grid.cells:
        if (scores := SCORES.get((cell.method, cell.seed))) is not None:
            finish(cell, scores)
        else:
            stop_half_way(cell, matrix(0.5, 0.5, 0.5))
    return grid


def results_of(grid: Grid, folder: Path) -> Results:
    return read_results(SweepFolder(folder / "sweep"), [(cell.order, cell.method, cell.seed) for cell in grid.cells])


def test_mean_and_deviation_follow_from_metrics_json(grid: Grid, tmp_path: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_table(results_of(grid, tmp_path)))))
    by_seed = {(line["method"], line["seed"]): line for line in lines}
    for name in METRICS:
        values = []
        for seed in (0, 1):
            path = tmp_path / "sweep" / "runs" / "own" / "sequential" / f"seed{seed}" / "metrics.json"
            values.append(json.loads(path.read_text())[name])
            assert float(by_seed["sequential", str(seed)][name]) == values[-1]
        mean = (values[0] + values[1]) / 2
        assert float(by_seed["sequential", "mean"][name]) == pytest.approx(mean, abs=1e-15)
        # Sample standard deviation of two values.
        deviation = abs(values[0] - values[1]) / math.sqrt(2)
        assert float(by_seed["sequential", "std"][name]) == pytest.approx(deviation, abs=1e-15)
    assert by_seed["sequential", "mean"]["n"] == "2"
    assert by_seed["sequential", "mean"]["average_performance"] == "0.625"
    assert by_seed["sequential", "mean"]["forgetting"] == "0.3125"


def test_unfinished_runs_do_not_count(grid: Grid, tmp_path: Path) -> None:
    lines = list(csv.DictReader(io.StringIO(csv_table(results_of(grid, tmp_path)))))
    half = next(line for line in lines if (line["method"], line["seed"]) == ("migu", "1"))
    assert (half["status"], half["average_performance"]) == ("interrupted", "")
    mean, std = (line for line in lines if line["method"] == "migu" and line["seed"] in ("mean", "std"))
    assert (mean["n"], mean["average_performance"], std["average_performance"]) == ("1", "0.625", "")


def test_the_page(grid: Grid, tmp_path: Path) -> None:
    page = markdown_page(results_of(grid, tmp_path), "recipe").splitlines()
    assert page[2:6] == [
        "| order | method | seeds | AP | BWT | forgetting | learning accuracy | FWT |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| own | sequential | 2 | 0.6250 ± 0.0000 | -0.3125 ± 0.2652 | 0.3125 ± 0.2652 | 0.7812 ± 0.1326 "
        "| 0.1250 ± 0.0000 |",
        "| own | migu | 1 of 2 | 0.6250 | -0.1250 | 0.1250 | 0.6875 | 0.1250 |",
    ]
    assert page[-1] == "- own migu seed1: interrupted, 1 of 2 tasks done"


def test_the_tables_note_how_tasks_were_scored(tmp_path: Path) -> None:
    grid = make_grid(tmp_path)
    for cell in grid.cells:
        first, second = (task.name for task in cell.recipe.stream.tasks)
        metrics = ("exact_match", "rouge_l" if cell.method == "migu" else "exact_match")
        scoring = {
            first: {"metric": metrics[0], "scored_on": "train"},
            second: {"metric": metrics[1], "scored_on": "train"},
        }
        finish(cell, matrix(0.5, 0.5, 0.5), scoring)  # type: ignore[arg-type]
    results = results_of(grid, tmp_path)
    different = f"the metrics are means of different scores: exact_match ({first}); rouge_l ({second})."
    for page in (markdown_page(results, "recipe"), latex_table(results).replace(r"\_", "_")):
        assert f"All runs: scored on training data: {first}, {second}." in page
        assert f"own migu seed0, own migu seed1: {different}" in page
        assert (
            "The runs have different scores, so their metrics are not comparable: exact_match: own sequential seed0, "
            "own sequential seed1; exact_match + rouge_l: own migu seed0, own migu seed1."
        ) in page
    lines = csv.DictReader(io.StringIO(csv_table(results)))
    assert {(line["method"], line["scored_by"]) for line in lines} == {
        ("sequential", "exact_match"), ("migu", "exact_match + rouge_l"),
    }  # fmt: skip


def test_runs_of_earlier_calls_stay_in_the_table(grid: Grid, tmp_path: Path) -> None:
    results = read_results(SweepFolder(tmp_path / "sweep"), [("own", "kif", 5)])
    assert [(row.method, len(row.cells), len(row.finished)) for row in results.rows] == [
        ("kif", 1, 0),
        ("migu", 2, 1),
        ("sequential", 2, 2),
    ]
    assert str(results.missing[0].state) == "missing"


def test_a_finished_run_without_its_metrics_and_a_damaged_one(grid: Grid, tmp_path: Path) -> None:
    before = csv_table(results_of(grid, tmp_path))
    first, *_, last = grid.cells
    first.folder.metrics.unlink()
    assert csv_table(results_of(grid, tmp_path)) == before
    last.folder.manifest.write_text("{")
    assert results_of(grid, tmp_path).missing[0].state.status == "damaged"


def test_general_ability_has_columns_if_a_run_has_measured_it(grid: Grid, tmp_path: Path) -> None:
    path = grid.cells[0].folder.metrics
    path.write_text(json.dumps({**json.loads(path.read_text()), "general_ability": 0.5, "general_forgetting": -0.25}))
    results = results_of(grid, tmp_path)
    assert list(results.columns)[-2:] == ["general_ability", "general_forgetting"]
    cells, *_ = csv.DictReader(io.StringIO(csv_table(results)))
    assert (cells["general_ability"], cells["general_forgetting"]) == ("0.5", "-0.25")
    page = markdown_page(results, "r").splitlines()
    assert page[2].endswith("| learning accuracy | FWT | general ability | general forgetting |")
    assert page[4].endswith("| 0.7812 ± 0.1326 | 0.1250 ± 0.0000 | – | – |")  # the other seed did not measure it
    assert "general ability" in latex_table(results)


def row(order: str, method: str, *averages: float) -> Row:
    state = CellState("finished", 2, 2)
    none = dict.fromkeys(METRICS)
    cells = [
        CellResult(order, method, seed, state, {**none, "average_performance": value})
        for seed, value in enumerate(averages)
    ]
    return Row(order, method, tuple(cells))


class TestBounds:
    """Rows of per_task and multi_task, whatever they are called."""

    SINGLE = ((0.0, 0.0), (0.875, 0.0), (0.25, 0.5))
    """Each task learnt by itself: 0.875 and 0.5."""
    JOINT = ((0.0, 0.0), (0.75, 0.5), (0.75, 0.5))

    def results(self, folder: Path, methods: str = "sequential,alone=per_task,multi_task", seeds: str = "0") -> Results:
        grid = make_grid(folder, methods=methods, seeds=seeds)
        scores = {"sequential": matrix(0.75, 0.25, 1.0), "multi_task": self.JOINT}
        for cell in grid.cells:
            finish(cell, scores.get(cell.method, self.SINGLE))
        return results_of(grid, folder)

    def test_show_only_the_metrics_that_are_a_bound(self, tmp_path: Path) -> None:
        results = self.results(tmp_path)
        page = markdown_page(results, "r").splitlines()
        assert page[2].endswith("| learning accuracy | FWT | FWT (single) |")
        assert page[5] == "| own | alone | 1 | – | – | – | 0.6875 | – | – |"
        assert page[6] == "| own | multi_task | 1 | 0.6250 | 0.0000 | 0.0000 | 0.6250 | – | – |"
        note = (
            "alone trains every task separately: its learning accuracy is the bound, and its other metrics have no "
            "meaning."
        )
        assert note in page
        assert rf"\multicolumn{{9}}{{l}}{{{note}}} \\" in latex_table(results).splitlines()
        lines = {(line["method"], line["seed"]): line for line in csv.DictReader(io.StringIO(csv_table(results)))}
        for seed in ("0", "mean"):
            empty = [name for name, value in lines["alone", seed].items() if value == "" and name in results.columns]
            assert set(results.columns) - set(empty) == {"learning_accuracy"}

    def test_other_runs_are_compared_with_the_per_task_run(self, tmp_path: Path) -> None:
        results = self.results(tmp_path, seeds="0,1")
        # Learnt in turn 0.75 and 1.0, alone 0.875 and 0.5.
        assert [cell.values["forward_transfer_single"] for cell in results.rows[0].cells] == [0.1875, 0.1875]
        assert "| 0.1875 ± 0.0000 |" in markdown_page(results, "r")

    def test_a_seed_without_a_per_task_run_has_no_forward_transfer(self, tmp_path: Path) -> None:
        for methods, seeds in (("sequential,alone=per_task", "0"), ("sequential", "1")):
            for cell in make_grid(tmp_path, methods=methods, seeds=seeds).cells:
                finish(cell, self.SINGLE if cell.method == "alone" else matrix(0.75, 0.25, 1.0))
        row, _ = read_results(SweepFolder(tmp_path / "sweep"), []).rows[::-1]
        assert [cell.values["forward_transfer_single"] for cell in row.cells] == [0.1875, None]
        assert row.mean("forward_transfer_single") is None

    def test_several_per_task_runs_are_ambiguous(self, tmp_path: Path) -> None:
        results = self.results(tmp_path, methods="sequential,per_task,alone=per_task")
        assert "forward_transfer_single" not in results.columns

    def test_there_is_no_footnote_without_them(self, grid: Grid, tmp_path: Path) -> None:
        results = results_of(grid, tmp_path)
        assert "trains every task separately" not in markdown_page(results, "r") + latex_table(results)


class TestSeveralOrders:
    """The mean of the orders' means."""

    RESULTS = Results((row("a", "x", 0.5, 0.25), row("a", "y", 1.0), row("b", "x", 1.0), row("b", "y")))

    def test_is_shown_if_every_order_has_a_mean(self) -> None:
        values = {method: found["average_performance"] for method, found in self.RESULTS.over_orders()}
        assert values == {"x": 0.6875, "y": None}
        assert "| mean of orders | x |  | 0.6875 | – | – | – | – |" in markdown_page(self.RESULTS, "r")

    def test_is_omitted_for_a_single_order(self) -> None:
        assert Results((row("a", "x", 0.5),)).over_orders() == []


class TestLatex:
    """table.tex"""

    def test_the_whole_file(self) -> None:
        results = Results((row("order_1", "a&b", 0.5, 0.25), row("two", "a&b")))
        assert latex_table(results).splitlines()[1:] == [
            r"\begin{tabular}{llrrrrrr}",
            r"\toprule",
            r"order & method & seeds & AP & BWT & forgetting & learning accuracy & FWT \\",
            r"\midrule",
            r"order\_1 & a\&b & 2 & $0.3750 \pm 0.1768$ & -- & -- & -- & -- \\",
            r"\midrule",
            r"two & a\&b & 0 & -- & -- & -- & -- & -- \\",
            r"\midrule",
            r"mean of orders & a\&b &  & -- & -- & -- & -- & -- \\",
            r"\bottomrule",
            r"\end{tabular}",
        ]

    def test_every_special_character(self) -> None:
        escaped = r"\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}\textbackslash{}"
        assert escape_latex("&%$#_{}~^\\") == escaped


def test_the_three_files(grid: Grid, tmp_path: Path) -> None:
    sweep = SweepFolder(tmp_path / "sweep")
    sweep.write_tables(render_tables(results_of(grid, tmp_path), "recipe"))
    assert sorted(path.name for path in sweep.path.glob("table.*")) == ["table.csv", "table.md", "table.tex"]
