"""`cl-dist slurm` and the job in `cl-dist status`, as far as they need no Slurm; tests/slurm has the rest."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from cl_dist.config.load import load_recipe
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from tests.cli.conftest import Command
from tests.recipes import write_recipe


def values(script: str, *names: str) -> list[str]:
    """The script's variables as bash sees them."""
    head = script.partition("# From here on")[0]
    printing = "printf '%s\\n' " + " ".join(f'"${{{name}}}"' for name in names)
    done = subprocess.run(["bash", "-c", f"{head}\n{printing}"], capture_output=True, text=True, check=True, env={})
    return done.stdout.splitlines()


def test_prints_a_script_and_changes_nothing(command: Command, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    before = sorted(tmp_path.iterdir())
    code, script, error = command("slurm", recipe, "--nodes", "2", "--time", "1:00:00", "--set", "train.seed=7")
    assert (code, error) == (0, "")
    assert sorted(tmp_path.iterdir()) == before
    assert script.splitlines()[1].endswith(f"cl-dist slurm {recipe} --nodes 2 --time 1:00:00 --set train.seed=7")
    assert "#SBATCH --job-name=recipe\n#SBATCH --nodes=2\n#SBATCH --ntasks-per-node=1\n" in script
    assert values(script, "run_folder", "working_folder") == [str(tmp_path / "run"), str(tmp_path)]
    words = ["run", str(recipe), "--set", "train.seed=7", "--set", "launch.processes=2"]
    words += ["--set", "launch.device=cpu"]
    assert values(script, "arguments[@]") == words


def test_the_printed_command_names_the_same_recipe(command: Command, tmp_path: Path) -> None:
    odd = tmp_path / "it's $(mine)"
    odd.mkdir()
    text = "model.name_or_path='builtin:llama-tiny'"
    script = command("slurm", write_recipe(odd), "--set", text, "--gpus-per-node", "2")[1]
    _, name, *words = values(script, "arguments[@]")
    recipe, _ = load_recipe(name, words[1::2])
    assert (recipe.launch.processes, recipe.launch.device) == (2, "cuda")
    assert recipe.output_dir == str(odd / "run") == values(script, "run_folder")[0]
    assert values(script, "python")[0].endswith("python") or "python3" in values(script, "python")[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nodes", "0"], "--nodes: 0 is too few"),
        (["--time", "later"], "--time: 'later' is not a time limit"),
        (["--set", "train.epochs=0"], "train.epochs: 0 is not allowed"),
        (["--set", "model.name_or_path=/nowhere"], "/nowhere"),
        (["--set", "stream.tasks.0.format=tasl", "--set", "stream.tasks.0.path=/nowhere"], "/nowhere"),
        (["--sbatch", "wrap=reboot"], "--sbatch: wrap cannot be set"),
        (["--set", "launch.device=cuda"], "launch.device: cuda, but the job asks Slurm for no GPUs; give --gpus-per"),
        (["--set", "launch.device=cpu", "--gpus-per-node", "a100:4"], "--gpus-per-node: a100:4, but launch.device is"),
    ],
)
def test_bad_input_is_one_sentence(command: Command, tmp_path: Path, arguments: list[str], message: str) -> None:
    code, output, error = command("slurm", write_recipe(tmp_path), *arguments)
    assert (code, output) == (2, "")
    assert message in error
    assert len(error.splitlines()) == 1


def test_nothing_is_written_if_jobs_cannot_be_submitted(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")
    code, _, error = command("slurm", recipe, "--submit")
    assert (code, error[:45]) == (2, "cl-dist: error: --submit: sbatch is not insta")
    assert not (tmp_path / "run").exists()


def test_the_printed_script_handles_fresh(command: Command, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path)
    assert values(command("slurm", recipe, "--fresh")[1], "fresh") == ["1"]
    assert values(command("slurm", recipe)[1], "fresh") == ["0"]
    code, _, error = command("slurm", recipe, "--fresh", "--resume")
    assert (code, "--resume and --fresh exclude each other" in error) == (2, True)


@pytest.mark.parametrize("refused", [True, False])
def test_the_old_run_is_moved_aside_for_a_job_that_slurm_accepts(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    recipe, run = write_recipe(tmp_path), tmp_path / "run"
    run.mkdir()
    Manifest(tasks=("spring",), world_size=2, zero_stage=2, status="interrupted").write(run / "manifest.json")
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\n" + ("echo 'sbatch: error: no such account' >&2; exit 1" if refused else "echo 17"))
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    code, _, error = command("slurm", recipe, "--fresh", "--submit")
    assert (code, "no such account" in error) == ((2, True) if refused else (0, False))
    assert (run / "manifest.json").exists() is refused
    assert len(list(tmp_path.glob("run.old-*"))) == (0 if refused else 1)
    if not refused:
        assert values((run / "slurm" / "01" / "job.sh").read_text(), "fresh") == ["0"]


def submitted(folder: Path, number: int = 17) -> None:
    record = RunFolder(folder).new_slurm_record()
    record.path.mkdir(parents=True)
    record.job.write_text(f'{{"job": "{number}", "submitted": "2026-01-01T00:00:00", "max_restarts": 20}}')


def test_status_of_a_job_that_has_not_started(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    submitted(tmp_path)
    code, output, _ = command("status", tmp_path)
    assert code == 0
    assert output.splitlines() == [
        "status      not started",
        "job         17; Slurm does not answer, or no longer knows it",
        f"log         {tmp_path}/slurm/01/slurm-17.log",
    ]


def test_status_of_a_run_with_two_jobs_shows_the_latest(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    Manifest(tasks=("spring",), world_size=2, zero_stage=2, status="interrupted").write(tmp_path / "manifest.json")
    submitted(tmp_path)
    submitted(tmp_path, 18)
    RunFolder(tmp_path).new_slurm_record().path.mkdir()  # one that Slurm rejected
    lines = command("status", tmp_path)[1].splitlines()
    assert lines[0] == "status      interrupted; continue with --resume"
    assert f"log         {tmp_path}/slurm/02/slurm-18.log" in lines


def test_a_damaged_record_is_named(command: Command, tmp_path: Path) -> None:
    submitted(tmp_path)
    (tmp_path / "slurm" / "01" / "job.json").write_text("{")
    code, _, error = command("status", tmp_path)
    assert code == 2
    assert "slurm/01/job.json is damaged" in error
