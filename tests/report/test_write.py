"""Whole reports of run folders in the run's own format."""

from __future__ import annotations

import csv
import json
import os
import re
from pathlib import Path

import pytest
import torch

from cl_dist.errors import BadInput
from cl_dist.report.write import HTML, PAGE, Report, write_report, write_several
from cl_dist.state.run_folder import RunFolder
from tests.report.runs import llama_lora, write_run, write_units

LONG = ["yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb", "sst-2", "dbpedia", "agnews", "yahoo", "multirc"]
LONG += ["boolqa", "wic"]
PLAIN = [HTML, PAGE, "accuracy_matrix.png", "scores.png", "loss.png"]
OF_UNITS = ["unit_importance.png", "unit_importance.csv", "fusion.csv"]
OF_TWO_TASKS = ["task_correlation.png", "task_correlation.csv", "fusion.png"]


def scores(tasks: int, units: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return list(torch.randn(tasks, units, generator=generator).mul(2).exp())


def kif_run(path: Path, tasks: list[str], done: int, layers: int = 2, rank: int = 2) -> RunFolder:
    folder = write_run(path, tasks, done)
    write_units(folder, llama_lora(layers, rank), "rank", scores(done, 7 * layers * rank))
    return folder


def linked(page: str) -> set[str]:
    """Files that the page links to."""
    return set(re.findall(r"\]\(<?([^)>]+)>?\)", page))


def edited(vectors: list[torch.Tensor]) -> list[torch.Tensor]:
    """One unit that is important to the first task, and equal scores for the third."""
    vectors[0][:] = 0.0
    vectors[0][9] = 5.0
    vectors[2][:] = 1.0
    return vectors


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of a run of four tasks with KIF."""
    folder = write_run(tmp_path_factory.mktemp("finished") / "run", LONG[:4], 4)
    write_units(folder, llama_lora(2, 2), "rank", edited(scores(4, 28)))
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()}
    report = write_report(folder.path)
    after = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before, "a report does not change the run"
    return report


class TestFinished:
    """A run of four tasks with KIF."""

    def test_everything_is_written_and_linked(self, finished: Report) -> None:
        assert finished.files == (*PLAIN, *OF_UNITS, *OF_TWO_TASKS)
        assert finished.missing == ()
        assert {path.name for path in finished.folder.iterdir()} == set(finished.files)
        page = (finished.folder / PAGE).read_text()
        assert linked(page) == {*finished.files, "../config.yaml"} - {PAGE, HTML}
        assert "What is missing" not in page

    def test_the_page_has_the_scores_and_metrics(self, finished: Report) -> None:
        page = (finished.folder / PAGE).read_text()
        assert page.startswith("# Run run\n\n4 of 4 tasks are finished; status: finished.\n")
        assert "| method | kif |" in page
        assert "| untouched | 0.0000 | 0.0500 | 0.1000 | 0.1500 |" in page
        assert "| after cb | 0.8000 | 0.8500 | 0.9000 | 0.9500 |" in page
        assert "| `average_performance` | 0.8750 | AP: mean of the last row" in page
        assert "forward_transfer_single" not in page
        assert "Scored by rouge_l." in page
        assert "| task | metric | split |" in page
        assert "| yelp | rouge_l | train |" in page
        assert "- The metrics are means of different scores: rouge_l (yelp); exact_match (amazon).\n" in page
        assert "- Scored on training data: yelp.\n" in page
        assert "| yelp | 3 | 2.0 | 300 | 0.5 |" in page
        assert "Peak memory of each rank, MiB: 512, 256." in page
        assert "28 units in 14 modules, 448 trained elements." in page

    def test_the_most_important_units_are_named(self, finished: Report) -> None:
        page = (finished.folder / PAGE).read_text()
        first = "`base_model.model.model.layers.0.mlp.gate_proj.lora.default[1]` 1, "
        assert f"| yelp | {first}`base_model.model.model.layers.0.self_attn.q_proj.lora.default[0]` 0, " in page
        assert "| mnli | all the same |" in page

    def test_correlations_with_equal_scores_are_left_empty(self, finished: Report) -> None:
        with (finished.folder / "task_correlation.csv").open() as file:
            table = {row["task"]: row for row in csv.DictReader(file)}
        assert [table["mnli"][name] for name in LONG[:4]] == [""] * 4
        assert table["yelp"]["yelp"] == "1.0"
        pair = torch.stack([scores(4, 28)[1], scores(4, 28)[3]]).double()
        assert float(table["amazon"]["cb"]) == pytest.approx(torch.corrcoef(pair)[0, 1].item(), abs=1e-12)
        assert table["amazon"]["cb"] == table["cb"]["amazon"]

    def test_the_data_is_the_methods(self, finished: Report) -> None:
        with (finished.folder / "unit_importance.csv").open() as file:
            rows = list(csv.DictReader(file))
        vector = scores(4, 28)[1].double()
        expected = (vector - vector.min()) / (vector.max() - vector.min())
        assert [float(row["amazon"]) for row in rows] == pytest.approx(expected.tolist(), abs=1e-12)
        assert {row["mnli"] for row in rows} == {"0.0"}
        assert rows[0]["unit"] == "base_model.model.model.layers.0.self_attn.q_proj.lora.default[0]"
        assert (rows[0]["module"], rows[0]["elements"]) == ("base_model.model.model.layers.0.self_attn.q_proj", "16")

    def test_a_second_report_elsewhere_has_the_same_bytes(self, finished: Report, tmp_path: Path) -> None:
        run = finished.run.folder.path
        other = write_report(run, tmp_path / "deep" / "er")
        assert other.files == finished.files
        for name in set(finished.files) - {PAGE}:
            assert (other.folder / name).read_bytes() == (finished.folder / name).read_bytes(), name
        link = os.path.relpath(run / "config.yaml", other.folder)
        page = (finished.folder / PAGE).read_text()
        assert (other.folder / PAGE).read_text() == page.replace("../config.yaml", link)


def test_a_run_without_units(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", LONG[:4], 4)
    assert list(write_report(folder.path).files) == PLAIN
    assert "unit" not in (folder.report / PAGE).read_text()


def test_fifteen_tasks(tmp_path: Path) -> None:
    folder = kif_run(tmp_path / "run", LONG, 15, layers=30, rank=8)
    report = write_report(folder.path)
    assert report.files == (*PLAIN, *OF_UNITS, *OF_TWO_TASKS)
    with (folder.report / "fusion.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 15 * 210
    assert {row["new_mean"] for row in rows[:210]} == {"1.0"}
    assert all(float(row["new_min"]) <= float(row["new_mean"]) <= float(row["new_max"]) for row in rows)


class TestUnfinished:
    """A run that is still running, or was stopped."""

    def test_reports_what_is_missing(self, tmp_path: Path) -> None:
        folder = kif_run(tmp_path / "run", LONG[:4], 2)
        report = write_report(folder.path)
        assert report.files == (*PLAIN, *OF_UNITS, *OF_TWO_TASKS)
        assert report.missing == ("The run is not finished: no results yet for mnli, cb.",)
        page = (folder.report / PAGE).read_text()
        assert "2 of 4 tasks are finished; status: interrupted." in page
        assert "Metrics so far, as if the stream ended with amazon:" in page
        assert "| `average_performance` | 0.4250 |" in page  # of 0.4 and 0.45, the first two in the last row
        assert "- The run is not finished: no results yet for mnli, cb." in page

    def test_a_single_task_has_no_correlation(self, tmp_path: Path) -> None:
        report = write_report(kif_run(tmp_path / "run", LONG[:4], 1).path)
        assert report.files == (*PLAIN, *OF_UNITS)
        assert report.missing[1] == "No correlation and no picture of fusion: both need two finished tasks."

    def test_no_task_is_finished(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", LONG[:2], 0)
        report = write_report(folder.path)
        assert list(report.files) == [HTML, PAGE, "accuracy_matrix.png", "scores.png"]
        assert report.missing[1] == "No training loss: log.jsonl is missing or has no steps."
        assert "## Training" not in (folder.report / PAGE).read_text()

    def test_there_is_only_the_manifest(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", ["a"], 0)
        content = json.loads(folder.manifest.read_text())
        del content["accuracy_matrix"]
        folder.manifest.write_text(json.dumps(content))
        folder.config.unlink()
        report = write_report(folder.path)
        assert report.files == (HTML, PAGE)
        assert [text.partition(":")[0] for text in report.missing] == [
            "The run is not finished",
            "No scores",
            "No training loss",
            "No settings",
        ]

    def test_steps_of_the_current_task_are_in_the_loss(self, tmp_path: Path) -> None:
        folder = write_run(tmp_path / "run", ["a", "b"], 0)
        folder.append_log({"event": "step", "task": "a", "step": 1, "loss": 2.0})
        folder.log.write_bytes(folder.log.read_bytes() + b'{"event": "step", "ta')
        report = write_report(folder.path)
        assert "loss.png" in report.files
        assert report.missing[1] == "1 line of log.jsonl cannot be read and is skipped."


class TestRefused:
    """Bad input creates no report, and leaves an older one unchanged."""

    def test_damaged_scores(self, tmp_path: Path) -> None:
        folder = kif_run(tmp_path / "run", LONG[:2], 2)
        before = {path: path.read_bytes() for path in write_report(folder.path).folder.iterdir()}
        folder.task(1, LONG[1]).unit_scores.write_bytes(b"damaged")
        with pytest.raises(BadInput, match=r"02-amazon/unit_scores\.safetensors is damaged"):
            write_report(folder.path)
        assert {path: path.read_bytes() for path in folder.report.iterdir()} == before

    def test_a_folder_that_does_not_exist(self, tmp_path: Path) -> None:
        with pytest.raises(BadInput, match="no such folder"):
            write_report(tmp_path / "absent", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_an_output_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "out").touch()
        run = write_run(tmp_path / "run", ["a"], 1).path
        for out in (tmp_path / "out", tmp_path / "out" / "below"):
            with pytest.raises(BadInput, match="cannot create the folder of the report"):
                write_report(run, out)

    def test_a_file_in_the_way(self, tmp_path: Path) -> None:
        run = write_run(tmp_path / "run", ["a"], 1).path
        (run / "report" / "scores.png").mkdir(parents=True)
        with pytest.raises(BadInput, match="the report cannot be written there: Is a directory"):
            write_report(run)

    @pytest.mark.parametrize("name", [HTML, "scores.png"])
    def test_files_of_others_are_kept(self, name: str, tmp_path: Path) -> None:
        runs = [write_run(tmp_path / each, ["a"], 1).path for each in ("one", "two")]
        out = tmp_path / "out"
        out.mkdir()
        (out / name).write_text("<!DOCTYPE html><title>mine</title>")
        with pytest.raises(BadInput, match=rf"out has files that no report wrote \({name}\); use --out DIR"):
            write_report(runs[0], out)
        assert [path.name for path in out.iterdir()] == [name]
        assert (out / name).read_text() == "<!DOCTYPE html><title>mine</title>"
        if name == HTML:
            with pytest.raises(BadInput, match="no report wrote"):
                write_several(runs, out)

    def test_a_report_is_replaced(self, tmp_path: Path) -> None:
        runs = [write_run(tmp_path / each, ["a"], 1).path for each in ("one", "two")]
        write_report(runs[0], tmp_path / "out")
        (tmp_path / "out" / "notes.txt").touch()
        assert b">two<" in (write_report(runs[1], tmp_path / "out").folder / HTML).read_bytes()
        assert b"2 runs side by side" in write_several(runs, tmp_path / "out").read_bytes()

    def test_the_folder_of_a_run(self, tmp_path: Path) -> None:
        runs = [write_run(tmp_path / each, ["a"], 1).path for each in ("one", "two")]
        with pytest.raises(BadInput, match="two is a run folder; give another folder"):
            write_report(runs[0], runs[1])
