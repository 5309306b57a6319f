"""A run that a signal stops through the real launcher saves its state, ends with exit code 75, and resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from tests import mpi
from tests.ranks import REPOSITORY, free_port
from tests.recipes import write_recipe
from tests.zygote import Zygote

PATIENCE_SECONDS = 120
PROGRAM = Path(sys.executable).with_name("cl-dist")
NO_MPI = mpi.missing()


def slow_recipe(folder: Path) -> Path:
    """Long enough (two times 64 steps) to be stopped in the middle."""
    return write_recipe(folder, train={"epochs": 16}, method={"name": "sequential"})


def short_recipe(folder: Path) -> Path:
    """For runs that nothing stops."""
    return write_recipe(folder, method={"name": "sequential"})


def endless_recipe(folder: Path) -> Path:
    """Long enough never to end during a test, however busy the machine is."""
    return write_recipe(folder, train={"epochs": 10_000}, method={"name": "sequential"})


def start(argv: list[str], folder: Path) -> subprocess.Popen[str]:
    return start_program([sys.executable, *argv], folder)


def start_program(command: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for_steps(run: Path, steps: int) -> None:
    """Return once the log has this many steps."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        log = run / "log.jsonl"
        if log.exists() and log.read_text().count('"step"') >= steps:
            return
        time.sleep(0.02)
    pytest.fail("the run took no steps")


def last_weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "tasks" / "02-summer" / "model" / "model.safetensors")


def finished(zygote: Zygote, folder: Path, recipe: Path) -> Path:
    outcome = zygote.run(["run", str(recipe)], folder, world=2)
    assert outcome.codes == [0, 0], outcome.output
    return folder / "run"


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    return finished(zygote, folder, slow_recipe(folder))


@pytest.fixture(scope="module")
def short(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("short")
    return finished(zygote, folder, short_recipe(folder))


def assert_same(run: Path, other: Path) -> None:
    ours, theirs = last_weights(run), last_weights(other)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_the_launcher(tmp_path: Path, undisturbed: Path, number: signal.Signals) -> None:
    recipe = slow_recipe(tmp_path)
    launcher = start(["-m", "cl_dist", "run", str(recipe)], tmp_path)
    wait_for_steps(tmp_path / "run", 3)
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 75, output
    assert "--resume" in output.splitlines()[-1]
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "interrupted"
    resumed = start(["-m", "cl_dist", "run", str(recipe), "--resume"], tmp_path)
    output, _ = resumed.communicate(timeout=PATIENCE_SECONDS)
    assert resumed.returncode == 0, output
    assert "Traceback" not in output
    assert_same(tmp_path / "run", undisturbed)


def leave_a_trap(folder: Path) -> None:
    """Put modules and settings into the working folder that must be ignored."""
    for name in ("peft", "datasets", "safetensors", "runpy", "importlib"):
        (folder / f"{name}.py").write_text('raise SystemExit("code from the working folder was run")')
    (folder / ".numba_config.yaml").write_text(f"cache_dir: {folder / 'numba'}")


def listening(process: psutil.Process) -> set[str]:
    """Addresses that a process listens on."""
    return {entry.laddr.ip for entry in process.net_connections("tcp") if entry.status == psutil.CONN_LISTEN}


def saved(run: Path) -> list[int]:
    """Steps of the states in the manifest."""
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "interrupted"
    return [entry["step"] for entry in manifest["checkpoints"]]


def lost(run: Path) -> list[str]:
    """The log's record of lost output."""
    records = map(json.loads, (run / "log.jsonl").read_text().splitlines())
    return [record["message"].partition(" bytes of ")[2] for record in records if record["event"] == "output_lost"]


def test_ctrl_c_ends_tee_first_and_the_state_is_saved(tmp_path: Path) -> None:
    """Ctrl-C also reaches tee. The content of the working folder is ignored, and other machines cannot connect."""
    recipe = endless_recipe(tmp_path)
    leave_a_trap(tmp_path)
    line = f"{PROGRAM} run {recipe} 2>&1 | tee log; exit ${{PIPESTATUS[0]}}"
    shell = subprocess.Popen(["bash", "-c", line], cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    wait_for_steps(tmp_path / "run", 3)
    ranks = [each for each in psutil.Process(shell.pid).children(recursive=True) if "RANK" in each.environ()]
    assert len(ranks) == 2
    assert [listening(rank) for rank in ranks] == [{"127.0.0.1"}] * 2
    os.killpg(shell.pid, signal.SIGINT)
    assert shell.wait(timeout=PATIENCE_SECONDS) == 75
    assert len(saved(tmp_path / "run")) == 1
    # If no further line was due, nothing was lost.
    assert set(lost(tmp_path / "run")) <= {"standard output were lost: its reader is gone"}
    assert "code from the working folder" not in (tmp_path / "log").read_text()
    assert not (tmp_path / "numba").exists()


def test_a_reader_that_has_stopped_delays_nothing(tmp_path: Path) -> None:
    """A waiting pager, or a terminal after Ctrl-S: the pipe is full, and writing to it blocks."""
    recipe = endless_recipe(tmp_path)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(1 << 16))
    os.set_blocking(writer, True)
    launcher = subprocess.Popen([PROGRAM, "run", recipe], cwd=tmp_path, stdout=writer, stderr=writer)
    wait_for_steps(tmp_path / "run", 3)
    launcher.terminate()
    assert launcher.wait(timeout=PATIENCE_SECONDS) == 75
    assert len(saved(tmp_path / "run")) == 1
    assert lost(tmp_path / "run") == ["standard output were lost: its reader has stopped reading"]
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize(
    "redirection",
    ["| head -1", *(pytest.param(text, marks=pytest.mark.slow) for text in (">&- 2>&- <&-", ">/dev/full 2>&1"))],
)
def test_a_run_is_done_whoever_reads_of_it(tmp_path: Path, redirection: str) -> None:
    recipe = write_recipe(tmp_path, launch={"processes": 1}, method={"name": "sequential"})
    line = f"{PROGRAM} run {recipe} {redirection}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run" / "metrics.json").exists()
    assert len(lost(tmp_path / "run")) == ("&-" not in redirection)


def test_the_launcher_killed_takes_its_ranks_along(tmp_path: Path, undisturbed: Path, zygote: Zygote) -> None:
    recipe = slow_recipe(tmp_path)
    launcher = start(["-m", "cl_dist", "run", str(recipe)], tmp_path)
    wait_for_steps(tmp_path / "run", 3)
    ranks = psutil.Process(launcher.pid).children()
    assert len(ranks) == 2
    launcher.kill()
    _, alive = psutil.wait_procs(ranks, timeout=10)
    assert alive == []
    outcome = zygote.run(["run", str(recipe), "--resume"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert_same(tmp_path / "run", undisturbed)


def test_a_second_run_is_refused_and_a_killed_rank_ends_the_first_one(tmp_path: Path) -> None:
    """On the same folder; the message of the killed rank comes last."""
    recipe = endless_recipe(tmp_path)
    launcher = start(["-m", "cl_dist", "run", str(recipe)], tmp_path)
    wait_for_steps(tmp_path / "run", 3)
    second = start(["-m", "cl_dist", "run", str(recipe), "--resume"], tmp_path)
    output, _ = second.communicate(timeout=PATIENCE_SECONDS)
    assert second.returncode == 2
    assert "is in use by process" in output

    ranks = psutil.Process(launcher.pid).children()
    victim = next(rank for rank in ranks if rank.environ()["RANK"] == "1")
    victim.kill()
    output, _ = launcher.communicate(timeout=PATIENCE_SECONDS)
    assert launcher.returncode == 1, output
    assert "rank 1" in output.splitlines()[-1]
    assert "SIGKILL" in output.splitlines()[-1]


@pytest.mark.parametrize(
    "launcher",
    [
        "torchrun",
        "deepspeed",
        pytest.param("mpirun", marks=pytest.mark.skipif(NO_MPI is not None, reason=NO_MPI or "")),
    ],
)
def test_under_other_launchers_the_weights_are_the_same(tmp_path: Path, short: Path, launcher: str) -> None:
    recipe, port, python = short_recipe(tmp_path), f"--master_port={free_port()}", sys.executable
    command = {
        "mpirun": [*mpi.MPIRUN, "-np", "2", python, "-m", "cl_dist"],
        "torchrun": [python, "-m", "torch.distributed.run", "--nproc_per_node=2", port, "-m", "cl_dist"],
        "deepspeed": [
            python, "-m", "deepspeed.launcher.runner", "--num_accelerators=2", port, "--module", "cl_dist"
        ],
    }[launcher]  # fmt: skip
    if launcher == "torchrun":
        leave_a_trap(tmp_path)
    process = start_program([*command, "run", str(recipe)], tmp_path)
    output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 0, output
    assert_same(tmp_path / "run", short)
