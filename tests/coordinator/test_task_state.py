"""A damaged end state of a completed task: the task is trained again, and the run ends like an undisturbed one."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.damage import DAMAGES
from tests.faults.test_kill_and_resume import STEPS, assert_same_end
from tests.recipes import write_recipe
from tests.zygote import Zygote

NAMES = ("spring", "summer", "autumn")
FOLDERS = ("01-spring", "02-summer", "03-autumn")
METHODS: dict[str, dict[str, Any]] = {
    "migu": {"train": {"keep_optimizer": True}},
    "inclora": {},
    "kif": {},
}
"""Methods and their settings; the parameters of inclora grow, kif has its own tensors."""


def three_tasks(folder: Path, method: str) -> Path:
    """Three tasks of eight steps, no checkpoint inside."""
    sections: dict[str, dict[str, Any]] = {
        "model": {"lora": {"r": 4, "dropout": 0.1}},
        "stream": {
            "tasks": [{"name": name, "format": "builtin"} for name in NAMES],
            "max_train_samples": 8 * STEPS,
        },
        "method": {"name": method},
        "checkpoint": {"every_steps": None},
    }
    return write_recipe(folder, **sections, **METHODS[method])


class Runs:
    """Runs of one method: undisturbed, and killed in the second step of the third task."""

    def __init__(self, zygote: Zygote, method: str, folder: Path) -> None:
        self._zygote, self.method = zygote, method
        self.undisturbed, self.killed = folder / "undisturbed", folder / "killed"
        self.run(self.undisturbed)
        fault = {"moment": "step", "on_rank": 1, "count": 2 * STEPS + 2}
        outcome = zygote.run(["run", str(self._recipe(self.killed))], self.killed, world=2, fault=fault)
        assert outcome.codes[1] == -signal.SIGKILL, outcome.output

    def _recipe(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        return three_tasks(folder, self.method)

    def run(self, folder: Path, *options: str, code: int = 0) -> str:
        """Output of rank 0."""
        outcome = self._zygote.run(["run", str(self._recipe(folder)), *options], folder, world=2)
        assert outcome.codes == [code, code], outcome.output
        return outcome.output[0]


@pytest.fixture(scope="module", params=METHODS)
def runs(request: pytest.FixtureRequest, zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(zygote, request.param, tmp_path_factory.mktemp(request.param))


def states(run: Path) -> list[str]:
    return sorted(path.parent.name for path in run.glob("tasks/*/state"))


def state_file(run: Path, task: str) -> Path:
    return run / "tasks" / task / "state" / "rank-00000.safetensors"


def test_the_task_is_trained_again_from_the_end_state_before_it(runs: Runs, tmp_path: Path) -> None:
    run = shutil.copytree(runs.killed / "run", tmp_path / "run")
    assert states(run) == ["01-spring", "02-summer"]
    DAMAGES["middle byte flipped"](state_file(run, "02-summer"))
    output = runs.run(tmp_path, "--resume")
    assert f"{state_file(run, '02-summer')} is damaged: its content does not match its checksum; " in output
    assert "; going back to the start of task summer\n" in output
    assert_same_end(run, runs.undisturbed / "run", FOLDERS)
    assert states(run) == ["03-autumn"], "states that no resume needs are kept"
    manifest = json.loads((run / "manifest.json").read_text())
    assert len(manifest["timings"]) == 3
    assert manifest["segments"] == json.loads((runs.undisturbed / "run" / "manifest.json").read_text())["segments"]


def test_if_that_is_damaged_too_nothing_is_deleted(runs: Runs, tmp_path: Path) -> None:
    run = shutil.copytree(runs.killed / "run", tmp_path / "run")
    DAMAGES["middle byte flipped"](state_file(run, "01-spring"))
    DAMAGES["deleted"](state_file(run, "02-summer"))
    before = json.loads((run / "manifest.json").read_text())
    output = runs.run(tmp_path, "--resume", code=1)
    assert (
        f"cl-dist: error: {state_file(run, '02-summer')} is missing, and {state_file(run, '01-spring')} is damaged: "
        "its content does not match its checksum; there is no older state to resume from; still intact: the scores so "
        f"far and, in {run}/tasks, the models after spring, summer\n"
    ) in output
    after = json.loads((run / "manifest.json").read_text())
    assert after == {**before, "status": "failed", "restarts": 1}
    assert states(run) == ["01-spring", "02-summer"]
    shutil.copy(state_file(runs.killed / "run", "01-spring"), state_file(run, "01-spring"))  # from a backup, say
    runs.run(tmp_path, "--resume")
    assert_same_end(run, runs.undisturbed / "run", FOLDERS)
