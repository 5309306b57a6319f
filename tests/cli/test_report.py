"""`cl-dist report`"""

from __future__ import annotations

from pathlib import Path

from tests.cli.conftest import Command
from tests.report.runs import write_run


def test_prints_the_scores_and_the_files_it_wrote(command: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", ["spring", "summer"], 1)
    code, output, error = command("report", "run")
    assert (code, error) == (0, "")
    assert output.splitlines() == [
        "              spring  summer",
        "before        0.0000  0.1667",
        "after spring  0.3333  0.5000",
        "",
        "The run is not finished: no results yet for summer.",
        *(f"wrote run/report/{name}" for name in ("report.md", "accuracy_matrix.png", "scores.png", "loss.png")),
    ]
    assert (tmp_path / "run/report/report.md").exists()


def test_writes_elsewhere(command: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", ["spring"], 1)
    code, output, _ = command("report", "run", "--out", "pages/mine")
    assert code == 0
    assert output.splitlines()[-1] == "wrote pages/mine/loss.png"
    assert len(list((tmp_path / "pages/mine").iterdir())) == 4
    assert not (tmp_path / "run/report").exists()


def test_bad_input_is_one_sentence(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name, message in {
        "absent": "absent: no such folder; give the run folder (output_dir) of a run",
        "file": "file is not a folder; give the run folder (output_dir) of a run",
        ".": "manifest.json is missing: . holds no run",
    }.items():
        assert command("report", name) == (2, "", f"cl-dist: error: {message}\n")
    write_run(tmp_path / "run", ["spring"], 1).manifest.write_text("{")
    code, _, error = command("report", "run")
    assert code == 2
    assert error.startswith("cl-dist: error: run/manifest.json is damaged: ")
