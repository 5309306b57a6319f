"""`cl-dist recipe`, `methods`, `status` and `report`"""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from cl_dist.config.load import dump_recipe, load_recipe, shipped_recipes
from cl_dist.methods.catalogue import built_in, known
from cl_dist.methods.config import exclusion
from cl_dist.methods.ewc.config import EwcConfig
from cl_dist.state.lock import RunLock
from cl_dist.state.manifest import CheckpointEntry, Manifest
from tests.cli.conftest import Command
from tests.report.runs import write_run

MATRIX = ((0.25, 0.5), (0.75, 0.5), (0.5, 1.0))
MANIFEST = Manifest(tasks=("spring", "summer"), world_size=2, zero_stage=3, accuracy_matrix=MATRIX[:1])


@pytest.mark.parametrize("arguments", [["recipe"], ["methods", "migu"], ["recipe", "--explain", "stream."]])
def test_texts_fit_into_a_terminal(arguments: list[str], tmp_path: Path) -> None:
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 72, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "cl_dist", *arguments]
    process = subprocess.Popen(command, stdout=slave, stderr=slave, stdin=slave, env=environment, cwd=tmp_path)
    os.close(slave)
    shown = b""
    with suppress(OSError):  # EIO: all is read
        while data := os.read(master, 1 << 16):
            shown += data
    os.close(master)
    assert process.wait(timeout=60) == 0, shown
    lines = shown.decode().splitlines()
    assert len(lines) > 10
    assert max(map(len, lines)) <= 72


class TestRecipe:
    """`cl-dist recipe`"""

    def test_without_arguments_lists_the_shipped_recipes(self, command: Command) -> None:
        code, output, _ = command("recipe")
        assert code == 0
        assert [line.split()[0] for line in output.splitlines()] == list(shipped_recipes())
        assert all(len(line.split()) > 5 for line in output.splitlines())

    def test_with_changes_or_all_prints_all_settings(self, command: Command) -> None:
        code, output, _ = command("recipe", "quickstart", "--set", "method.name=migu")
        assert (code, output) == (0, dump_recipe(load_recipe("quickstart", ["method.name=migu"])[0]))
        assert command("recipe", "quickstart", "--all")[1] == dump_recipe(load_recipe("quickstart")[0])

    def test_of_ones_own_file_prints_all_settings(self, command: Command, tmp_path: Path) -> None:
        (tmp_path / "my.yaml").write_text(command("recipe", "quickstart")[1])
        printed = command("recipe", "my.yaml")[1]
        assert printed == dump_recipe(load_recipe("quickstart")[0])

    @pytest.mark.parametrize("name", shipped_recipes())
    def test_of_a_shipped_recipe_keeps_its_comments_and_loads_as_the_same(
        self, command: Command, tmp_path: Path, name: str
    ) -> None:
        text = command("recipe", name)[1]
        assert text.startswith("# ")
        (tmp_path / f"{name}.yaml").write_text(text)
        assert load_recipe(f"{name}.yaml") == load_recipe(name)

    def test_explains_every_setting(self, command: Command) -> None:
        code, output, _ = command("recipe", "--explain")
        assert code == 0
        assert "method(migu).threshold\n    a number, at least 0, below 1 (default: 0.7)\n    Quantile T" in output

    @pytest.mark.parametrize(
        ("prefix", "keys"),
        [
            ("zero.", ["zero.stage", "zero.offload", "zero.deepspeed"]),
            ("train.epochs", ["train.epochs"]),
            ("stream.tasks.labels", ["stream.tasks[].labels"]),
            ("stream.tasks[].labels", ["stream.tasks[].labels"]),
            ("migu.mask_", ["method(migu).mask_bias", "method(migu).mask_scope"]),
            ("method.lambda", ["method(olora).lambda1", "method(olora).lambda2"]),
        ],
    )
    def test_explains_the_settings_that_start_with_a_word(self, command: Command, prefix: str, keys: list[str]) -> None:
        _, output, _ = command("recipe", "--explain", prefix)
        assert [line for line in output.splitlines() if line and not line.startswith(" ")] == keys

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--explain", "train.epoch_"], "--explain: no setting starts with train.epoch_; did you mean train.epochs?"
             ),
            (["--explain", "epochs"], "--explain: no setting starts with epochs; did you mean stream.tasks[].epochs or "
             "train.epochs?"),
            (["--explain", "xyzzy"], "--explain: no setting starts with xyzzy"),
            (["quickstart", "--schema"], "--schema: is about the settings of all recipes, so quickstart has no effect; "
             "leave it out"),
            (["--explain", "train", "--set", "a=1"], "--explain: is about the settings of all recipes, so --set has no "
             "effect; leave it out"),
            (["--all"], "--all: no recipe to print; name one, as in: cl-dist recipe quickstart --all"),
        ],
    )  # fmt: skip
    def test_what_means_nothing_is_one_sentence(self, command: Command, arguments: list[str], message: str) -> None:
        assert command("recipe", *arguments) == (2, "", f"cl-dist: error: {message}\n")

    def test_prints_a_schema_that_knows_plugins(self, command: Command) -> None:
        schema = json.loads(command("recipe", "--schema")[1])
        assert schema["required"] == ["model", "stream"]

    def test_a_change_needs_a_recipe(self, command: Command) -> None:
        code, _, error = command("recipe", "--set", "train.epochs=1")
        assert (code, error[:24]) == (2, "cl-dist: error: --set: n")


class TestMethods:
    """`cl-dist methods`"""

    def test_each_is_listed_whole(self, command: Command) -> None:
        code, output, _ = command("methods")
        assert code == 0
        blocks = dict(block.split("\n", 1) for block in output.strip().split("\n\n"))
        assert sorted(blocks) == sorted(built_in())
        assert all("\n    composes with: " in block for block in blocks.values())
        migu = " ".join(blocks["migu"].split())
        assert "settings: threshold (0.7), mask (gradient), " in migu
        assert "composes with: agem, ewc, inclora, kif, lwf, olora, recurrent_kif, replay, sequential, tasl" in migu
        assert migu.endswith("source: https://arxiv.org/abs/2406.17245")
        assert "not with kif and recurrent_kif: kif, tasl and recurrent_kif all fuse weights" in " ".join(
            blocks["tasl"].split()
        )

    def test_what_composes_is_what_a_recipe_may_combine(self, command: Command) -> None:
        block = " ".join(command("methods", "ewc")[1].partition("\n\n")[0].split())
        listed = block.partition("composes with: ")[2].partition(" not with ")[0].split(", ")
        assert listed == [name for name, cls in known().items() if name != "ewc" and not exclusion(EwcConfig, cls)]

    def test_one_comes_with_the_meaning_of_its_settings(self, command: Command) -> None:
        output = command("methods", "replay")[1]
        assert output.startswith("replay\n")
        assert "\n\nmethod(replay).ratio\n    a number, " in output
        assert "method(migu)" not in output

    def test_an_unknown_one_is_one_sentence(self, command: Command) -> None:
        code, output, error = command("methods", "migu", "mgiu")
        assert (code, output) == (2, "")
        assert error.startswith('cl-dist: error: methods: there is no method "mgiu"; allowed: agem, ewc, ')


class TestStatus:
    """`cl-dist status`"""

    def test_of_a_run_that_was_killed(self, command: Command, tmp_path: Path) -> None:
        checkpoint = CheckpointEntry(task=1, step=40, folder="checkpoint/task-02-step-000040")
        manifest = replace(MANIFEST, completed=1, checkpoints=(checkpoint,), accuracy_matrix=MATRIX[:2], restarts=3)
        manifest.write(tmp_path / "manifest.json")
        code, output, _ = command("status", tmp_path)
        assert code == 0
        assert output.splitlines()[:5] == [
            "status      killed; continue with --resume",
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


REPORT = ("report.md", "accuracy_matrix.png", "scores.png", "loss.png", "index.html")


def test_report_prints_the_scores_and_the_files_it_wrote(command: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", ["spring", "summer"], 1)
    code, output, error = command("report", "run")
    assert (code, error) == (0, "")
    assert output.splitlines() == [
        "              spring  summer",
        "before        0.0000  0.1667",
        "after spring  0.3333  0.5000",
        "",
        "The run is not finished: no results yet for summer.",
        *(f"wrote run/report/{name}" for name in REPORT),
    ]
    assert all((tmp_path / "run/report" / name).exists() for name in REPORT)


def test_report_writes_elsewhere(command: Command, tmp_path: Path) -> None:
    write_run(tmp_path / "run", ["spring"], 1)
    code, output, _ = command("report", "run", "--out", "pages/mine")
    assert code == 0
    assert output.splitlines()[-1] == "wrote pages/mine/index.html"
    assert len(list((tmp_path / "pages/mine").iterdir())) == len(REPORT)
    assert not (tmp_path / "run/report").exists()


def test_report_of_several_runs_and_other_formats(command: Command, tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_run(tmp_path / name, ["spring"], 1)
    assert command("report", "one", "two") == (0, f"wrote {tmp_path.resolve() / 'report' / 'index.html'}\n", "")
    code, output, _ = command("report", "one", "two", "--out", "both", "--figures", "PDF")
    assert (code, output) == (0, "wrote both/index.html\n")
    assert {path.suffix for path in (tmp_path / "both").iterdir()} == {".html", ".png", ".pdf"}
    code, _, error = command("report", "one", "--figures", "png,gif")
    assert code == 2
    assert '"gif" is not a format of pictures; allowed: png, svg, pdf' in error


def test_bad_input_of_report_is_one_sentence(command: Command, tmp_path: Path) -> None:
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
