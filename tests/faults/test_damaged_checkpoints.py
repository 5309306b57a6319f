"""A damaged checkpoint is reported, and the previous state used; the run ends like an undisturbed one."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.faults.damage import DAMAGES
from tests.faults.test_kill_and_resume import STEPS, assert_same_end, evaluations, recipe
from tests.zygote import Outcome, Zygote


@pytest.fixture(scope="module")
def undisturbed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = zygote.run(["run", str(recipe(folder)), "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], outcome.output
    states = [path.name for path in folder.glob("run/checkpoint/*")] + list(folder.glob("run/tasks/*/state"))
    assert states == [folder / "run" / "tasks" / "02-summer" / "state"], "states that no resume needs take space"
    return folder / "run"


def killed(zygote: Zygote, folder: Path, moment: str, count: int) -> Path:
    """Run folder of a run of which rank 0 was killed."""
    fault = {"moment": moment, "on_rank": 0, "count": count}
    outcome = zygote.run(["run", str(recipe(folder))], folder, world=2, fault=fault)
    assert outcome.codes[0] == -signal.SIGKILL, outcome.output
    return folder / "run"


@pytest.fixture(scope="module")
def in_first_task(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in the last step of the first task, with checkpoints of steps 3 and 6."""
    return killed(zygote, tmp_path_factory.mktemp("first"), "step", STEPS)


@pytest.fixture(scope="module")
def in_second_task(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in the last step of the second task."""
    return killed(zygote, tmp_path_factory.mktemp("second"), "step", 2 * STEPS)


def copied(run: Path, folder: Path, damaged: Sequence[tuple[str, str]]) -> Path:
    """A copy of a run with some of its files damaged."""
    shutil.copytree(run, folder / "run")
    for name, damage in damaged:
        DAMAGES[damage](folder / "run" / name)
    return folder / "run"


def resumed(zygote: Zygote, folder: Path) -> Outcome:
    return zygote.run(["run", str(recipe(folder)), "--resume", "--debug"], folder, world=2)


def named(run: Path) -> list[int]:
    """Steps of the checkpoints in the manifest."""
    return [entry["step"] for entry in json.loads((run / "manifest.json").read_text())["checkpoints"]]


NEWEST = "checkpoint/task-01-step-000006"
CASES = [
    ("state.json", "half of it"),
    ("rank-00001.json", "deleted"),
    ("rank-00001.safetensors", "middle byte flipped"),
]
"""tests/state/test_snapshot.py has all files and all damages."""


@pytest.mark.parametrize(("file", "damage"), CASES, ids=[" ".join(case) for case in CASES])
def test_the_checkpoint_before_is_used(
    zygote: Zygote, undisturbed: Path, in_first_task: Path, tmp_path: Path, file: str, damage: str
) -> None:
    run = copied(in_first_task, tmp_path, [(f"{NEWEST}/{file}", damage)])
    assert named(run) == [3, 6]
    outcome = resumed(zygote, tmp_path)
    assert outcome.codes == [0, 0], outcome.output
    lines = [line for line in outcome.output[0].splitlines() if f"{NEWEST}/{file} is " in line]
    assert len(lines) == 1
    assert lines[0].endswith("; going back to the state before it")
    assert f"resuming task spring after step 3 of {STEPS}\n" in outcome.output[0]
    assert_same_end(run, undisturbed)


def test_a_state_that_cannot_be_read_now_is_not_given_up(
    zygote: Zygote, undisturbed: Path, in_first_task: Path, tmp_path: Path
) -> None:
    """One rank's file of the newest state cannot be read; once it can, a resume continues from there."""
    run = copied(in_first_task, tmp_path, [])
    file, behind = run / NEWEST / "rank-00001.safetensors", tmp_path / "behind"
    file.rename(behind)
    file.symlink_to(file)
    outcome = zygote.run(["run", str(recipe(tmp_path)), "--resume"], tmp_path, world=2)
    sentence = (
        f"{file} cannot be read: Too many levels of symbolic links; nothing was deleted, and --resume tries again"
    )
    assert outcome.codes == [1, 1], outcome.output
    assert f"cl-dist: error: {sentence}\n" in outcome.output[0]
    assert "internal error" not in "".join(outcome.output)
    assert named(run) == [3, 6]
    assert file.is_symlink()
    behind.replace(file)
    outcome = resumed(zygote, tmp_path)
    assert outcome.codes == [0, 0], outcome.output
    assert f"resuming task spring after step 6 of {STEPS}\n" in outcome.output[0]
    assert_same_end(run, undisturbed)


def test_without_any_checkpoint_the_first_task_begins_anew(
    zygote: Zygote, undisturbed: Path, in_first_task: Path, tmp_path: Path
) -> None:
    damaged = [
        (f"{NEWEST}/rank-00000.safetensors", "half of it"),
        ("checkpoint/task-01-step-000003/state.json", "deleted"),
    ]
    run = copied(in_first_task, tmp_path, damaged)
    outcome = resumed(zygote, tmp_path)
    assert outcome.codes == [0, 0], outcome.output
    assert "no saved state inside task spring is intact: training it from the start\n" in outcome.output[0]
    assert_same_end(run, undisturbed)


IN_SECOND = [
    ("checkpoint/task-02-step-000006/rank-00001.json", "deleted"),
    ("checkpoint/task-02-step-000003/rank-00000.safetensors", "last byte flipped"),
]


def test_without_any_checkpoint_a_later_task_begins_anew(
    zygote: Zygote, undisturbed: Path, in_second_task: Path, tmp_path: Path
) -> None:
    run = copied(in_second_task, tmp_path, IN_SECOND)
    outcome = resumed(zygote, tmp_path)
    assert outcome.codes == [0, 0], outcome.output
    assert "no saved state inside task summer is intact: training it from the start\n" in outcome.output[0]
    assert_same_end(run, undisturbed)


END_OF_FIRST = "tasks/01-spring/state/rank-00001.safetensors"


def test_without_its_end_state_the_task_before_begins_anew(
    zygote: Zygote, undisturbed: Path, in_second_task: Path, tmp_path: Path
) -> None:
    run = copied(in_second_task, tmp_path, [*IN_SECOND, (END_OF_FIRST, "middle byte flipped")])
    outcome = resumed(zygote, tmp_path)
    assert outcome.codes == [0, 0], outcome.output
    damage = f"{run / END_OF_FIRST} is damaged: its content does not match its checksum"
    assert f"{damage}; going back to the start of task spring\n" in outcome.output[0]
    assert evaluations(run).count(("01-spring", "spring")) == 2
    assert_same_end(run, undisturbed)


def test_a_damaged_end_state_costs_the_steps_after_the_last_checkpoint(
    zygote: Zygote, undisturbed: Path, tmp_path: Path
) -> None:
    """Killed while the trained task is being evaluated, with one score of it (the first two evaluations are of the
    untouched model). That score is of a model that is trained again, and is found again.
    """
    run = killed(zygote, tmp_path, "evaluation", 4)
    assert evaluations(run)[-1] == ("01-spring", "spring")
    assert named(run) == [6, STEPS]
    DAMAGES["nothing of it"](run / "tasks" / "01-spring" / "state" / "rank-00000.json")
    outcome = resumed(zygote, tmp_path)
    assert outcome.codes == [0, 0], outcome.output
    assert f"resuming task spring after step 6 of {STEPS}\n" in outcome.output[0]
    assert evaluations(run).count(("01-spring", "spring")) == 2
    assert_same_end(run, undisturbed)


def saved_steps(run: Path) -> list[tuple[str, int]]:
    """Task and step of every save in the log."""
    records: list[dict[str, Any]] = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(record["task"], record["step"]) for record in records if record["event"] == "saved"]


def test_one_ranks_clock_makes_all_of_them_save(zygote: Zygote, undisturbed: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, checkpoint={"every_steps": None, "every_minutes": 60.0})
    clock_of_rank_1 = {"moment": "clock", "on_rank": 1, "count": 5}
    outcome = zygote.run(["run", str(path), "--debug"], tmp_path, world=2, fault=clock_of_rank_1)
    assert outcome.codes == [0, 0], outcome.output
    assert saved_steps(tmp_path / "run") == [("spring", 5), ("spring", STEPS), ("summer", STEPS)]
    assert_same_end(tmp_path / "run", undisturbed)


def test_as_many_checkpoints_are_kept_as_asked_for(zygote: Zygote, undisturbed: Path, tmp_path: Path) -> None:
    path = recipe(tmp_path, checkpoint={"every_steps": None, "every_minutes": 1e-9, "keep": 3})
    fault = {"moment": "step", "on_rank": 1, "count": 7}
    outcome = zygote.run(["run", str(path)], tmp_path, world=2, fault=fault)
    assert outcome.codes[1] == -signal.SIGKILL
    folders = sorted((tmp_path / "run" / "checkpoint").glob("task-*"))
    assert [folder.name for folder in folders] == [f"task-01-step-{step:06d}" for step in (4, 5, 6)]
    assert named(tmp_path / "run") == [4, 5, 6]
    for folder in folders[1:]:
        shutil.rmtree(folder)
    outcome = resumed(zygote, tmp_path)
    assert outcome.codes == [0, 0], outcome.output
    assert f"resuming task spring after step 4 of {STEPS}\n" in outcome.output[0]
    assert_same_end(tmp_path / "run", undisturbed)
