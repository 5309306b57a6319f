"""The disk is full while a checkpoint is written: the run stops and says so, and goes on once there is room."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_kill_and_resume import EVERY, STEPS, assert_same_end
from tests.ranks import REPOSITORY
from tests.state.test_atomic import can_mount


@pytest.mark.skipif(not can_mount(), reason="mounting a small disk in a user namespace is not allowed here")
def test_the_run_stops_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    command = ["unshare", "-Urm", sys.executable, "-m", "tests.faults.full_disk_run", str(tmp_path)]
    job = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert job.returncode == 0, job.stderr
    told = json.loads((tmp_path / "told.json").read_text())
    codes, output = told["full"]
    assert codes == [1, 1], output
    staging = f"checkpoint/.task-01-step-{2 * EVERY:06d}.tmp-staging/rank-00001.safetensors"
    for said in output:
        assert "no space left on the disk of " in said
        assert f"{staging}: nothing was replaced and the last complete state there is intact; free some space" in said
        assert "Traceback" not in said
    assert told["kept"] == [f"task-01-step-{EVERY:06d}"], "the half-written state takes room"
    assert told["manifest"]["status"] == "failed"
    assert [entry["step"] for entry in told["manifest"]["checkpoints"]] == [EVERY]
    codes, output = told["resumed"]
    assert codes == [0, 0], output
    assert f"resuming task spring after step {EVERY} of {STEPS}\n" in output[0]
    codes, output = told["undisturbed"]
    assert codes == [0, 0], output
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed" / "run")
