"""Read-only commands on damaged run folders: one sentence, exit code 2."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_dist.state import stored_files
from cl_dist.state.run_folder import RunFolder
from tests.cli.conftest import Command
from tests.report.runs import write_run

DEEP = "[" * 100_000
METRICS = {"tasks": ["a", "b"], "accuracy_matrix": [[0.0, 0.0], [1.0, 0.0], [0.5, 1.0]], "average_performance": 0.75}

ANY_JSON = ["", "{", "[]", "null", "7", '"text"', "{}", DEEP, "{}".encode("utf-16"), b"\xff\xfe{}", b"\0" * 100]
"""Contents that are invalid for any file of a run."""
BAD_METRICS = [
    {"tasks": None},
    {"accuracy_matrix": None},
    {"accuracy_matrix": 7},
    {"accuracy_matrix": [["high", 0.0]]},
    {"accuracy_matrix": [[0.5]]},
    {"accuracy_matrix": [[0.5, 0.5]] * 9},
    {"average_performance": "high"},
    {"tokens_per_second": [1]},
    {"tasks": ["a"]},
]
BAD_MANIFESTS = [
    {"accuracy_matrix": [0]},
    {"accuracy_matrix": [10**9]},
    {"accuracy_matrix": [-1]},
    {"accuracy_matrix": [10**400]},
    {"row_under_way": "x"},
    {"completed": 10**30},
    {"completed": 1e308},
    {"tasks": {"a": 1}},
    {"tasks": []},
    {"general": [{}]},
    {"general": [{"after": "a", "scores": {"t": {}}}]},
    {"general": [{"after": "a", "scores": {"t": {"score": "x", "metrics": {}, "samples": 1}}}]},
    {"segments": [{}]},
    {"inputs": {}},
    {"inputs": {"data": [], "base_model": None, "tokenizer": None}},
    {"timings": [{"steps": "many"}]},
    {"format_version": "new"},
    {"format_version": []},
]


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = write_run(tmp_path / "run", ["a", "b"], 2)
    folder.metrics.write_text(json.dumps(METRICS))
    return folder


def refused(outcome: tuple[int, str, str], name: str) -> None:
    """Expect one sentence that names the file, and no partial output before it."""
    code, output, error = outcome
    assert (code, output) == (2, ""), error
    assert error.startswith("cl-dist: error: ")
    assert error.count("\n") == 1
    assert name in error
    assert len(error) < 600


def write(path: Path, content: str | bytes) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)


def test_what_a_run_has_written_is_shown(command: Command, run: RunFolder) -> None:
    for name in ("status", "report"):
        assert command(name, run.path)[0] == 0


@pytest.mark.parametrize("content", ANY_JSON, ids=range(len(ANY_JSON)))
def test_no_json_of_ours(command: Command, run: RunFolder, content: str | bytes) -> None:
    write(run.metrics, content)
    refused(command("status", run.path), "metrics.json is damaged: ")
    write(run.manifest, content)
    for name in ("status", "report", "eval"):
        refused(command(name, run.path), "manifest.json is damaged: ")


@pytest.mark.parametrize("change", BAD_METRICS, ids=str)
def test_metrics_of_another_kind(command: Command, run: RunFolder, change: dict[str, object]) -> None:
    write(run.metrics, json.dumps(METRICS | change))
    if change == {"tasks": None}:  # the manifest has them
        assert command("status", run.path)[0] == 0
    else:
        refused(command("status", run.path), "metrics.json is damaged: ")


@pytest.mark.parametrize("change", BAD_MANIFESTS, ids=lambda change: str(change)[:60])
def test_a_manifest_of_another_kind(command: Command, run: RunFolder, change: dict[str, object]) -> None:
    write(run.manifest, json.dumps(json.loads(run.manifest.read_text()) | change))
    for name in ("report", "eval") if change == {"accuracy_matrix": [0]} else ("status", "report", "eval"):
        code, output, error = command(name, run.path)
        if change == {"accuracy_matrix": [0]} and name == "eval":
            assert code == 2  # the model is not there
        else:
            refused((code, output, error), " is damaged: ")


@pytest.mark.parametrize("name", ["manifest.json", "metrics.json", "scores.jsonl", "log.jsonl", "config.yaml"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(command: Command, run: RunFolder, name: str) -> None:
    (run.path / name).unlink()
    os.mkfifo(run.path / name)
    looks = "report" if name in ("log.jsonl", "config.yaml") else "status"
    refused(command(looks, run.path), f"{name} is damaged: it is not a regular file")


@pytest.mark.parametrize("name", ["manifest.json", "metrics.json", "scores.jsonl"])
def test_a_huge_file_is_not_read(command: Command, run: RunFolder, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(run.path / name, stored_files.MOST_BYTES + 1)
    refused(command("status", run.path), f"{name} is damaged: it has 268435457 bytes, more than such a file ever has")


LINES: list[Callable[[], str]] = [
    lambda: "{",
    lambda: "7",
    lambda: DEEP,
    lambda: json.dumps({"event": "step", "task": "a", "step": 10**12, "loss": 1.0}),
    lambda: json.dumps({"event": "step", "task": "a", "step": -3, "loss": 1.0}),
    lambda: json.dumps({"event": "step", "task": "a", "step": "2", "loss": 1.0}),
    lambda: json.dumps({"event": "step", "task": "a", "step": 2, "loss": "low"}),
    lambda: json.dumps({"event": "step", "task": "a", "step": 2, "loss": 10**400}),
    lambda: json.dumps({"event": "step", "task": ["a"], "step": 2}),
    lambda: json.dumps({"event": "evaluation", "task": "a"}),
]


def test_lines_of_the_log_that_are_none_are_counted(command: Command, run: RunFolder) -> None:
    with run.log.open("a") as file:
        file.writelines(f"{line()}\n" for line in LINES)
    code, output, error = command("report", run.path)
    assert (code, error) == (0, "")
    assert f"{len(LINES) - 1} lines of log.jsonl cannot be read and are skipped." in output  # one names no task


@pytest.mark.parametrize("content", ["{", "- a", "7", "\0", b"\xff\xfe", "a: &a [*a]", DEEP], ids=range(7))
def test_a_damaged_recipe(command: Command, run: RunFolder, content: str | bytes) -> None:
    write(run.config, content)
    refused(command("report", run.path), "config.yaml is damaged: ")
    code, _, error = command("eval", run.path)
    assert code == 2
    assert "config.yaml" in error
    assert "internal error" not in error
