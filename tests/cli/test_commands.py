from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from cl_dist import __version__
from cl_dist.cli.failures import guarded
from cl_dist.config.load import dump_recipe, load_recipe, shipped_recipes
from cl_dist.errors import BadInput, ClDistError, Interrupted
from cl_dist.state.lock import RunLock
from cl_dist.state.manifest import CheckpointEntry, Manifest
from tests.cli.conftest import Command

PROGRAM = Path(sys.executable).with_name("cl-dist")
MATRIX = ((0.25, 0.5), (0.75, 0.5), (0.5, 1.0))
MANIFEST = Manifest(tasks=("spring", "summer"), world_size=2, zero_stage=3, accuracy_matrix=MATRIX[:1])


def test_the_version(command: Command) -> None:
    assert command("--version") == (0, f"cl-dist {__version__}\n", "")


class TestRecipe:
    """`cl-dist recipe`"""

    def test_alone_lists_what_is_shipped(self, command: Command) -> None:
        code, output, _ = command("recipe")
        assert code == 0
        assert [line.split()[0] for line in output.splitlines()] == shipped_recipes()
        assert all(len(line.split()) > 5 for line in output.splitlines())

    def test_with_a_name_prints_the_resolved_recipe(self, command: Command) -> None:
        code, output, _ = command("recipe", "quickstart", "--set", "method.name=migu")
        assert (code, output) == (0, dump_recipe(load_recipe("quickstart", ["method.name=migu"])[0]))

    def test_explains_every_setting(self, command: Command) -> None:
        code, output, _ = command("recipe", "--explain")
        assert code == 0
        assert "method(migu).threshold\n    a number, at least 0, below 1 (default: 0.7)\n    Quantile T" in output

    def test_cannot_change_what_is_not_named(self, command: Command) -> None:
        code, _, error = command("recipe", "--set", "train.epochs=1")
        assert (code, error[:24]) == (2, "cl-dist: error: --set: n")


def test_methods_are_listed_with_what_they_are(command: Command) -> None:
    code, output, _ = command("methods")
    assert code == 0
    baselines = ["sequential", "inclora", "olora", "replay", "ewc", "lwf", "agem", "per_task", "multi_task"]
    names = sorted([*baselines, "migu", "kif", "tasl", "recurrent_kif"])
    assert [line.split()[0] for line in output.splitlines()] == names
    assert all(line.endswith(".") for line in output.splitlines())
    assert "arXiv 2406.17245" in output


class TestStatus:
    """`cl-dist status`"""

    def test_of_a_run_that_was_killed(self, command: Command, tmp_path: Path) -> None:
        checkpoint = CheckpointEntry(task=1, step=40, folder="checkpoint/task-02-step-000040")
        manifest = replace(MANIFEST, completed=1, checkpoints=(checkpoint,), accuracy_matrix=MATRIX[:2], restarts=3)
        manifest.write(tmp_path / "manifest.json")
        code, output, _ = command("status", tmp_path)
        assert code == 0
        assert output.splitlines()[:5] == [
            "status      killed; --resume goes on",
            "tasks done  1 of 2",
            "checkpoint  in summer, after step 40",
            "ranks       2, ZeRO stage 3",
            "restarts    3",
        ]
        assert "after spring  0.7500  0.5000" in output

    def test_of_one_that_is_running(self, command: Command, tmp_path: Path) -> None:
        MANIFEST.write(tmp_path / "manifest.json")
        holder = "import sys, time; from pathlib import Path; from cl_dist.state.lock import RunLock\n"
        holder += "with RunLock(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
        process = subprocess.Popen([sys.executable, "-c", holder, tmp_path / ".lock"], stdout=subprocess.PIPE)
        try:
            assert process.stdout is not None
            process.stdout.readline()
            assert command("status", tmp_path)[1].startswith("status      running\n")
        finally:
            process.kill()
            process.communicate()

    def test_of_one_that_is_finished(self, command: Command, tmp_path: Path) -> None:
        manifest = replace(MANIFEST, status="finished", completed=2, accuracy_matrix=MATRIX)
        manifest.write(tmp_path / "manifest.json")
        with RunLock(tmp_path / ".lock"):
            pass
        metrics = {"tasks": ["spring", "summer"], "accuracy_matrix": MATRIX, "average_performance": 0.75}
        (tmp_path / "metrics.json").write_text(json.dumps(metrics))
        output = command("status", tmp_path)[1]
        assert output.startswith("status      finished\ntasks done  2 of 2\n")
        assert "after summer  0.5000  1.0000" in output
        assert "average performance (AP)           0.7500" in output
        assert "forgetting                         -" in output


class TestDoctor:
    """`cl-dist doctor`"""

    def test_looks_at_what_a_run_needs(self, command: Command) -> None:
        code, output, _ = command("doctor")
        found = {line[9:].split("  ")[0].strip() for line in output.splitlines()}
        assert {"cl-dist", "torch", "deepspeed", "C++ compiler", "devices", "disk", "ranks"} <= found
        assert code == int("PROBLEM" in output)

    def test_names_what_is_missing(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        code, output, _ = command("doctor")
        assert code == 1
        assert "PROBLEM  C++ compiler   no-such-compiler not found; DeepSpeed needs one" in output

    def test_says_who_started_the_ranks(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        assert "this is rank 1 of 2, started by torchrun or deepspeed" in command("doctor")[1]


class TestFailures:
    """What a command raises becomes a sentence and an exit code."""

    @pytest.mark.parametrize(
        ("error", "code", "text"),
        [
            (BadInput("train.epochs: no"), 2, "cl-dist: error: train.epochs: no\n"),
            (BadInput("first\nsecond"), 2, "cl-dist: error: first\ncl-dist: error: second\n"),
            (ClDistError("the disk is full"), 1, "cl-dist: error: the disk is full\n"),
            (Interrupted("stopped after step 3"), 75, "cl-dist: interrupted: stopped after step 3\n"),
            (KeyboardInterrupt(), 75, "cl-dist: interrupted: stopped before anything was started\n"),
            (
                OSError("a\nb"),
                1,
                "cl-dist: error: internal error: OSError: a b (run again with --debug for the traceback)\n",
            ),
        ],
    )
    def test_each_kind(self, error: BaseException, code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
        def fail(arguments: Namespace) -> int:
            raise error

        assert guarded(Namespace(command=fail, debug=False)) == code
        assert capsys.readouterr().err == text

    def test_debug_shows_the_traceback_too(self, command: Command) -> None:
        code, _, error = command("run", "absent.yaml", "--debug")
        assert code == 2
        assert error.startswith("Traceback")
        assert error.splitlines()[-1].startswith("cl-dist: error: absent.yaml: the recipe cannot be read")

    def test_a_launched_rank_leaves_its_words_to_the_launcher(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        def fail(arguments: Namespace) -> int:
            raise BadInput("train.epochs: no")

        monkeypatch.setenv("CL_DIST_FAILURE_FILE", str(tmp_path / "rank-0.json"))
        assert guarded(Namespace(command=fail, debug=False)) == 2
        assert capsys.readouterr().err == ""
        assert json.loads((tmp_path / "rank-0.json").read_text())["message"] == "train.epochs: no"

    def test_a_reader_that_has_had_enough_is_no_error(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        end = subprocess.run([PROGRAM, "methods"], stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
        os.close(writer)
        assert (end.returncode, end.stderr) == (141, "")


def test_a_whole_run_and_its_status(command: Command, tmp_path: Path) -> None:
    changes = ["train.max_steps_per_task=2", "stream.tasks=[{name: spring, format: builtin}]"]
    changes += ["stream.max_eval_samples=8", "launch.processes=2", "output_dir=here"]
    code, output, error = command("run", "quickstart", *(f"--set={change}" for change in changes))
    assert code == 0, error
    assert output.startswith("1 tasks on 2 ranks: spring\n")
    assert "step 2/2  loss " in output
    assert "average performance (AP)" in output.splitlines()[-6]
    assert len(json.loads((tmp_path / "here/metrics.json").read_text())["accuracy_matrix"]) == 2
    assert command("status", "here")[1].startswith("status      finished\ntasks done  1 of 1\n")
    assert command("report", "here")[1].endswith("wrote here/report/loss.png\n")
    assert command("run", "quickstart", "--set=output_dir=here")[0] == 2
