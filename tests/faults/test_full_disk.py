"""The disk fills up while a checkpoint is written: the run reports it and stops, and resumes once there is space."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.test_kill_and_resume import EVERY, STEPS, assert_same_end, recipe
from tests.ranks import REPOSITORY
from tests.state.test_atomic import can_mount
from tests.zygote import Zygote


@pytest.mark.skipif(not can_mount(), reason="mounting a small disk in a user namespace is not allowed here")
def test_the_run_stops_and_goes_on_once_there_is_room(tmp_path: Path) -> None:
    command = ["unshare", "-Urm", sys.executable, "-m", "tests.faults.full_disk_run", str(tmp_path)]
    job = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
    assert job.returncode == 0, job.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    codes, output = result["full"]
    assert codes == [1, 1], output
    staging = f"checkpoint/.task-01-step-{2 * EVERY:06d}.tmp-staging/rank-00001.safetensors"
    for said in output:
        assert "no space left on the disk of " in said
        assert f"{staging}: nothing was replaced and the last complete state there is intact; free some space" in said
        assert "Traceback" not in said
    assert result["kept"] == [f"task-01-step-{EVERY:06d}"], "the incomplete state takes space"
    assert result["manifest"]["status"] == "failed"
    assert [entry["step"] for entry in result["manifest"]["checkpoints"]] == [EVERY]
    codes, output = result["resumed"]
    assert codes == [0, 0], output
    assert f"resuming task spring after step {EVERY} of {STEPS}\n" in output[0]
    codes, output = result["undisturbed"]
    assert codes == [0, 0], output
    assert_same_end(tmp_path / "run", tmp_path / "undisturbed" / "run")


@pytest.mark.parametrize("line", [1, 12, 22], ids=["at the start", "in a step", "in the step after a save"])
def test_what_one_rank_cannot_write_ends_all(zygote: Zygote, tmp_path: Path, line: int) -> None:
    """A line of the log or the data order, which rank 0 writes alone while the other ranks continue."""
    fault = {"moment": "full disk at a line", "on_rank": 0, "count": line}
    outcome = zygote.run(["run", str(recipe(tmp_path))], tmp_path, world=2, fault=fault)
    assert outcome.codes == [1, 1], outcome.output
    for said in outcome.output:
        assert ".jsonl: nothing was replaced and the last complete state there is intact; free some space" in said
        assert "Traceback" not in said
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"
    outcome = zygote.run(["run", str(recipe(tmp_path)), "--resume"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output


@pytest.mark.parametrize("noted", ["finished", "failed"], ids=["as now", "as earlier releases left it"])
def test_a_finished_run_without_its_metrics(zygote: Zygote, tmp_path: Path, noted: str) -> None:
    path, manifest = recipe(tmp_path), tmp_path / "run" / "manifest.json"
    fault = {"moment": "full disk at the metrics", "on_rank": 0, "count": 1}
    outcome = zygote.run(["run", str(path)], tmp_path, world=2, fault=fault)
    assert outcome.codes == [1, 1], outcome.output
    assert '"status": "finished"' in manifest.read_text()
    manifest.write_text(manifest.read_text().replace('"status": "finished"', f'"status": "{noted}"'))
    outcome = zygote.run(["run", str(path), "--resume"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert '"status": "finished"' in manifest.read_text()
    assert (tmp_path / "run" / "metrics.json").exists()
