"""A day with a GPU, on a CPU: faulty parts cost only themselves, and nothing that was measured is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from cl_dist.benchmarks.gpu import day, measuring
from cl_dist.benchmarks.gpu.parts import PARTS, PLANNED_MINUTES, Part
from cl_dist.state.atomic import write_json
from tests.cli.conftest import Command

ROOT = Path(__file__).parents[3]
FAULTY = "tests.benchmarks.gpu.faulty_part"


def part_of(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the tests' own in the catalogue."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(measuring, "ENTRY_SECONDS", 1.0)
    for name in ("measure", "endless"):
        monkeypatch.setitem(PARTS, name, Part(name, f"{FAULTY}:{name}", 100, "fails"))


def test_a_faulty_measurement_costs_only_itself(faulty: None, command: Command, tmp_path: Path) -> None:
    code, output, error = command("bench", "gpu", "--out", "day", "--parts", "measure", "--device", "cpu")
    assert (code, error) == (0, "")
    found = part_of(tmp_path / "day", "measure")
    assert found["status"] == "done"
    assert found["mode"].startswith("CPU mode")
    assert found["measurements"]["good"]["value"] == 1
    assert found["measurements"]["last"]["value"] == 2
    reasons = {name: entry.get("failed") for name, entry in found["measurements"].items()}
    assert reasons == {
        "good": None,
        "raises": "RuntimeError: no such luck",
        "lacks a package": None,
        "crashes": "ended by SIGSEGV",
        "hangs": "took longer than 1 s",
        "last": None,
    }
    assert found["measurements"]["lacks a package"]["skipped"] == "not installed: a_package_that_nobody_has"
    assert "done, " in output
    assert "3 failed, 1 skipped [CPU mode]" in output
    assert "| measure | hangs | took longer than 1 s |" in output
    summary = part_of(tmp_path / "day", "summary")
    assert summary["mode"] == found["mode"]
    assert summary["parts"]["measure"]["status"] == "done"
    # The second call leaves the part alone.
    code, output, _ = command("bench", "gpu", "--out", "day", "--parts", "measure", "--device", "cpu")
    assert code == 0
    assert "done, measured before (--again measures it anew)" in output
    assert part_of(tmp_path / "day", "measure") == found


@pytest.mark.slow
@pytest.mark.parametrize("end", ["Ctrl-C", "SIGTERM", "limit", "kill"])
def test_what_was_measured_stays(tmp_path: Path, end: str) -> None:
    """However the day ends, everything measured is there, and nothing that the part started lives on."""
    minutes = "0.2" if end == "limit" else "9"
    sleeper, out = tmp_path / "sleeper", tmp_path / "day"
    code = (
        "from cl_dist.benchmarks.gpu.parts import PARTS, Part; from cl_dist.cli import program\n"
        f"PARTS['endless'] = Part('endless', '{FAULTY}:endless', 1000, 'sleeps'); program()"
    )
    arguments = ["bench", "gpu", "--out", str(out), "--parts", "endless", "--device", "cpu", "--minutes", minutes]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "SLEEPER": str(sleeper)}
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], env=environment)
    while not sleeper.exists() or not sleeper.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    if end != "limit":
        process.send_signal({"Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM, "kill": signal.SIGKILL}[end])
    assert process.wait(60) == {"Ctrl-C": 75, "SIGTERM": 75, "limit": 0, "kill": -signal.SIGKILL}[end]
    found = part_of(out, "endless")
    assert found["measurements"]["first"]["value"] == 1
    assert set(found["measurements"]) == {"first"}
    if end == "kill":
        assert found["status"] == "running"
    else:
        assert found["status"] == ("out of time" if end == "limit" else "interrupted")
        assert part_of(out, "summary")["parts"]["endless"]["status"] == found["status"]
        _await_end(int(sleeper.read_text()))


def _await_end(pid: int) -> None:
    """Wait until the process is gone; a minute is more than enough."""
    until = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_missing_package_skips_the_part_and_a_later_call_continues(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With no PyTorch at all, every part says so, and the day itself works."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    text = "raise ModuleNotFoundError('No module named torch', name='torch')\n"
    (hidden / "torch.py").write_text(text, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(hidden))
    code, output, _ = command("bench", "gpu", "--out", "day", "--parts", "machine,kernels")
    assert code == 0
    assert "machine      skipped (not installed: torch)" in output
    assert "kernels      skipped (not installed: torch)" in output
    assert part_of(tmp_path / "day", "kernels")["status"] in day.CONTINUED


def test_results_of_two_devices_are_not_mixed(command: Command, tmp_path: Path) -> None:
    folder = tmp_path / "day"
    folder.mkdir()
    write_json(folder / "machine.json", {"mode": "GPU", "device": "NVIDIA H200", "status": "done", "measurements": {}})
    code, _, error = command("bench", "gpu", "--out", "day", "--parts", "operations", "--device", "cpu")
    assert code == 2
    assert "cl-dist: error: --out day: it holds measurements of NVIDIA H200, and this is " in error


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--parts machine,nothing", "--parts machine,nothing: there is no part 'nothing'; allowed: machine, kernels, "),
        ("--minutes 0", "--minutes 0: invalid value; allowed: a number > 0"),
        ("--minutes soon", "--minutes soon: invalid value; allowed: a number > 0"),
        ("--device tpu", "--device tpu: invalid value; allowed: auto, cuda, cpu"),
        ("--parts machine", "--out: give a folder for the results"),
        ("--out file", "--out file: "),
        ("--out file/below", "--out file/below: "),
    ],
)
def test_bad_options_are_refused(command: Command, tmp_path: Path, arguments: str, sentence: str) -> None:
    (tmp_path / "file").write_text("")
    code, output, error = command("bench", "gpu", *arguments.split())
    assert (code, output) == (2, "")
    assert error.startswith(f"cl-dist: error: {sentence}")
    assert error.count("\n") == 1


def test_the_list(command: Command) -> None:
    code, output, _ = command("bench", "gpu", "--list", "--minutes", "4.5")
    assert code == 0
    lines = output.splitlines()
    assert [line.split()[0] for line in lines] == list(PARTS)
    assert all(f"{part.seconds / 2:4.0f} s" in line for line, part in zip(lines, PARTS.values(), strict=True))


def test_the_parts_fit_into_the_planned_minutes() -> None:
    assert sum(part.seconds for part in PARTS.values()) <= 60 * PLANNED_MINUTES


@pytest.mark.slow
def test_a_whole_day_from_a_plain_checkout(tmp_path: Path) -> None:
    """Every part, end to end, started with nothing but the checkout's folder as the working folder."""
    command_line = [sys.executable, "-m", "cl_dist.benchmarks.gpu", "--out", str(tmp_path), "--device", "cpu"]
    done = subprocess.run([*command_line, "--minutes", "30"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in PARTS:
        found = part_of(tmp_path, name)
        assert found["status"] == "done", found
        assert found["mode"].startswith("CPU mode")
        failed = {key: entry for key, entry in found["measurements"].items() if "failed" in entry}
        assert failed == {}, (name, failed)
    runs = part_of(tmp_path, "runs")["measurements"]
    assert runs["stage 2, MIGU, again"]["equal_bits"] is True
    assert "| stage 2, MIGU, again | 0 |" in done.stdout


@pytest.mark.slow
def test_without_deepspeed_and_peft(tmp_path: Path) -> None:
    """Only the parts and the measurements that need them are skipped."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    for name in ("deepspeed", "pydantic"):
        text = f"raise ModuleNotFoundError('No module named {name}', name='{name}')\n"
        (hidden / f"{name}.py").write_text(text, encoding="utf-8")
    command_line = [sys.executable, "-m", "cl_dist.benchmarks.gpu", "--out", str(tmp_path / "day"), "--device", "cpu"]
    done = subprocess.run(
        [*command_line, "--parts", "weight-grad,step,runs,engine"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(hidden)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert part_of(tmp_path / "day", "weight-grad")["status"] == "done"
    assert part_of(tmp_path / "day", "runs")["reason"] == "not installed: deepspeed"
    assert part_of(tmp_path / "day", "engine")["reason"] == "not installed: pydantic"
    step = part_of(tmp_path / "day", "step")["measurements"]
    assert step["full, 16 tokens, 1 layers"]["seconds"]["dense"]["median"] > 0
    assert step["LoRA r 4, 16 tokens, 1 layers"]["skipped"] == "not installed: pydantic"
