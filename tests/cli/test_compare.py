"""`cl-dist compare` as a command; tests/sweep has its grid and its tables."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.state.lock import RunLock
from cl_dist.sweep.folder import TABLES, SweepFolder
from tests.cli.conftest import Command
from tests.recipes import write_recipe
from tests.sweep.cells import finish, make_grid, matrix, stop_half_way

GRID = ("--methods", "sequential,migu", "--seeds", "0,1", "--out", "sweep")


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


class TestWithoutRunning:
    """Options that start no runs."""

    def test_a_dry_run_lists_the_grid_and_changes_nothing(self, command: Command, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path)
        grid = make_grid(tmp_path)
        finish(grid.cells[0], matrix(1, 1, 1))
        stop_half_way(grid.cells[1], matrix(1, 1, 1), "failed")
        stop_half_way(grid.cells[2], matrix(1, 1, 1), "running")
        before = files_in(tmp_path)
        code, output, error = command("compare", recipe, *GRID, "--dry-run")
        assert (code, error) == (0, "")
        assert output.splitlines() == [
            "4 runs in sweep/runs: 1 finished, 1 failed, 1 killed, 1 missing",
            "own sequential seed0  finished",
            "own migu seed0        failed, 1 of 2 tasks done",
            "own sequential seed1  killed, 1 of 2 tasks done",
            "own migu seed1        missing",
        ]
        assert files_in(tmp_path) == before

    def test_a_missing_gpu_is_noticed_before_the_first_run(
        self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        recipe = write_recipe(tmp_path)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
        code, output, error = command("compare", recipe, *GRID, "--set=launch.device=cuda")
        assert (code, output) == (2, "")
        assert error.startswith(
            "cl-dist: error: launch.device: cuda: CUDA_VISIBLE_DEVICES is -1, which hides every GPU"
        )
        assert files_in(tmp_path) == [Path(recipe)]

    def test_prints_the_commands_of_the_unfinished_runs(self, command: Command, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path)
        grid = make_grid(tmp_path)
        finish(grid.cells[0], matrix(1, 1, 1))
        stop_half_way(grid.cells[1], matrix(1, 1, 1))
        code, output, _ = command("compare", recipe, *GRID, "--print")
        words = [shlex.split(line) for line in output.splitlines()]
        assert code == 0
        assert ["--resume" in line for line in words] == [True, False, False]
        for cell, (program, run, name, *options) in zip(grid.cells[1:], words, strict=True):
            assert (program, run) == ("cl-dist", "run")
            changes = [word for word in options if word not in ("--set", "--resume")]
            assert load_recipe(name, changes)[0] == cell.recipe

    def test_writes_the_tables_of_the_results_so_far(self, command: Command, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path)
        finish(make_grid(tmp_path).cells[0], matrix(1, 0.5, 1))
        code, output, _ = command("compare", recipe, *GRID, "--table")
        assert code == 0
        assert output == (tmp_path / "sweep" / "table.md").read_text() + "\nwrote sweep/report/index.html\n"
        assert "| own | sequential | 1 of 2 | 0.7500 | -0.5000 | 0.5000 | 1.0000 |" in output
        assert {path.name for path in (tmp_path / "sweep").glob("table.*")} == set(TABLES)


class TestRefusals:
    """One sentence for each problem, before anything runs or is written."""

    @pytest.mark.parametrize(
        ("options", "reported"),
        [
            (["--methods", "migo,kiff"], ["did you mean migu?", "did you mean kif?"]),
            (["--set", "model.name_or_path=/nowhere"], ["/nowhere"]),
            (["--methods", "a=migu,b=migu", "--set-for", "b:model.name_or_path=/nowhere"], ["/nowhere"]),
            (["--methods", "a=migu,b=migu", "--set-for", "b:train.warmup_steps=9999"], ["train.warmup_steps: 9999"]),
            (["--set", "stream.tasks=[{name: x, format: tasl}]"], ["task 'x'"]),
            (["--set", "train.epochs=0"], ["train.epochs: 0 is not allowed"]),
        ],
    )
    def test_bad_input(self, command: Command, tmp_path: Path, options: list[str], reported: list[str]) -> None:
        code, output, error = command("compare", write_recipe(tmp_path), "--out", "sweep", *options)
        assert code == 2
        # What is wrong with the data or a model is found after the first lines, which say what is checked.
        assert output == "" or output.splitlines()[1:] == ["checking data and models"]
        assert len(error.splitlines()) == len(reported)
        assert all(text in line for text, line in zip(reported, error.splitlines(), strict=True))
        assert not (tmp_path / "sweep").exists()

    @pytest.mark.parametrize("change", ["train.epochs=2", "train.micro_batch_size=8"])
    def test_another_recipe_in_the_same_folder(self, command: Command, tmp_path: Path, change: str) -> None:
        recipe = write_recipe(tmp_path)
        finish(make_grid(tmp_path).cells[0], matrix(1, 1, 1))
        code, output, error = command("compare", recipe, *GRID, "--set", change)
        assert (code, output) == (2, "")
        assert "own/sequential/seed0: " in error
        assert error.count("choose another --out") == 1

    def test_another_setting_of_a_method_for_other_seeds(self, command: Command, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path)
        finish(make_grid(tmp_path).cells[1], matrix(1, 1, 1))
        options = ("--methods", "sequential,migu", "--seeds", "7", "--out", "sweep", "--dry-run")
        assert command("compare", recipe, *options)[0] == 0
        code, _, error = command("compare", recipe, *options, "--set-for", "migu:method.threshold=0.5")
        assert code == 2
        assert "own/migu/seed0: method[0].threshold: 0.7 in the run, 0.5 now" in error

    @pytest.mark.parametrize("asked", [("sequential", "7"), ("migu", "0"), ("migu", "7")], ids=" seed ".join)
    def test_other_tasks_in_the_same_table(self, command: Command, tmp_path: Path, asked: tuple[str, str]) -> None:
        """Other tasks than those of a run with another seed or method."""
        recipe = write_recipe(tmp_path)
        finish(make_grid(tmp_path).cells[0], matrix(1, 1, 1))
        options = ("--methods", asked[0], "--seeds", asked[1], "--out", "sweep", "--dry-run")
        assert command("compare", recipe, *options)[0] == 0
        other = "stream.tasks=[{name: autumn, format: builtin}, {name: summer, format: builtin}]"
        code, _, error = command("compare", recipe, *options, "--set", other)
        assert code == 2
        assert "own/sequential/seed0: stream.tasks[0].name: 'spring' in the run, 'autumn' now" in error

    def test_other_epochs_of_a_task(self, command: Command, tmp_path: Path) -> None:
        """In the cells of another method; the sweep's recipe sets no epochs per task."""
        recipe = write_recipe(tmp_path)
        grid = make_grid(tmp_path)
        finish(grid.cells[0], matrix(1, 1, 1))
        SweepFolder(tmp_path / "sweep").base.write_text(dump_recipe(grid.base))
        options = ("--methods", "migu", "--seeds", "0", "--out", "sweep", "--dry-run")
        longer = "stream.tasks.0.epochs=3"
        assert command("compare", recipe, *options, "--set-for", f"migu:{longer}")[0] == 0
        code, _, error = command("compare", recipe, *options, "--set", longer)
        assert code == 2
        assert "compare.yaml: stream.tasks[0].epochs: None in the run, 3 now" in error

    def test_another_base_than_the_first_call_had(self, command: Command, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path)
        sweep = SweepFolder(tmp_path / "sweep")
        sweep.path.mkdir()
        sweep.base.write_text(dump_recipe(make_grid(tmp_path).base))
        assert command("compare", recipe, *GRID, "--dry-run")[0] == 0
        code, _, error = command("compare", recipe, *GRID, "--dry-run", "--set", "train.weight_decay=0.5")
        assert code == 2
        assert "compare.yaml: train.weight_decay: 0.0 in the run, 0.5 now" in error

    def test_a_folder_with_other_things(self, command: Command, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path)
        code, _, error = command("compare", recipe, "--out", ".")
        assert code == 2
        assert "contains recipe.yaml but no compare.yaml" in error
        assert command("compare", recipe, "--out", recipe)[0] == 2

    def test_ranks_of_another_launcher(self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
            monkeypatch.setenv(name, value)
        code, _, error = command("compare", write_recipe(tmp_path), *GRID)
        assert code == 2
        assert "starts the ranks of its runs itself" in error

    def test_two_sweeps_at_once(self, command: Command, tmp_path: Path) -> None:
        recipe = write_recipe(tmp_path)
        (tmp_path / "sweep").mkdir()
        with RunLock(tmp_path / "sweep" / ".lock"):
            code, _, error = command("compare", recipe, *GRID)
        assert code == 2
        assert "is in use by process" in error

    def test_jobs_where_there_is_no_slurm(
        self, command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", "/nowhere")
        code, _, error = command("compare", write_recipe(tmp_path), *GRID, "--submit")
        assert (code, error[:45]) == (2, "cl-dist: error: --submit: sbatch is not insta")
        assert not (tmp_path / "sweep").exists()


SBATCH = """#!/bin/bash
echo "$PWD/$2" >> "$SBATCH_LOG"
echo $((100 + $(wc -l < "$SBATCH_LOG")))
"""


def test_submits_a_job_for_every_unfinished_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    grid = make_grid(tmp_path, changes=["launch.processes=4", "launch.device=cpu"])
    finish(grid.cells[0], matrix(1, 1, 1))
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(SBATCH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("SBATCH_LOG", str(tmp_path / "submitted"))
    code, output, error = command("compare", recipe, *GRID, "--submit", "--nodes", "2", "--ranks-per-node", "2")
    assert code == 0, error
    scripts = (tmp_path / "submitted").read_text().splitlines()
    assert len(scripts) == 3
    assert "own sequential seed0: finished" in output
    assert "submitted  job 103: 2 nodes, 2 ranks on each, on CPUs" in output
    for cell, script in zip(grid.cells[1:], scripts, strict=True):
        assert Path(script) == cell.folder.path / "slurm" / "01" / "job.sh"
        assert f"#SBATCH --job-name=own-{cell.method}-seed{cell.seed}\n#SBATCH --nodes=2\n" in Path(script).read_text()
        kept = load_recipe(str(cell.folder.path / "slurm" / "01" / "recipe.yaml"))[0]
        assert kept == cell.recipe
    assert "| own | migu | 0 of 2 |" in (tmp_path / "sweep" / "table.md").read_text()
