from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.state.manifest import CheckpointEntry, Manifest, Segment

MANIFEST = Manifest(tasks=("a", "b", "c"), world_size=2, zero_stage=3)
SEGMENT = Segment(task=0, step=0, world_size=2, zero_stage=3, micro_batch_size=4, gradient_accumulation=1)


def test_a_manifest_comes_back_equal(tmp_path: Path) -> None:
    manifest = replace(
        MANIFEST,
        status="interrupted",
        completed=1,
        checkpoints=(
            CheckpointEntry(task=1, step=20, folder="checkpoint/task-02-step-000020"),
            CheckpointEntry(task=1, step=40, folder="checkpoint/task-02-step-000040"),
        ),
        segments=(SEGMENT, replace(SEGMENT, step=20, world_size=1, gradient_accumulation=2)),
        accuracy_matrix=((0.1, 0.2, None), (0.9, 0.2, None)),
        restarts=2,
        timings=({"train": 1.5, "evaluate": 0.25},),
    )
    manifest.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == manifest
    assert manifest.checkpoint == manifest.checkpoints[1]


ENTRY = {"task": 0, "step": 7, "folder": "checkpoint/task-01-step-000007"}


@pytest.mark.parametrize(("old", "new"), [(None, ()), (ENTRY, (CheckpointEntry(**ENTRY),))])
def test_a_manifest_of_format_1_is_read(
    tmp_path: Path, old: dict[str, object] | None, new: tuple[CheckpointEntry, ...]
) -> None:
    """A manifest of the first releases: one checkpoint or null, and no segments."""
    document = {
        "tasks": ["a", "b"], "world_size": 2, "zero_stage": 3, "status": "running", "completed": 0, "checkpoint": old,
        "accuracy_matrix": [[0.5, None]], "peak_memory_bytes": [1, 2], "restarts": 1, "timings": [],
        "format_version": 1, "cl_dist_version": "0.1.0",
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(document))
    manifest = Manifest.read(tmp_path / "manifest.json")
    assert (manifest.checkpoints, manifest.segments, manifest.restarts) == (new, (), 1)
    manifest.write(tmp_path / "manifest.json")
    assert json.loads((tmp_path / "manifest.json").read_text())["format_version"] == 4
    assert Manifest.read(tmp_path / "manifest.json") == manifest


def test_a_manifest_of_format_3_has_no_device(tmp_path: Path) -> None:
    Manifest(tasks=("a",), world_size=2, zero_stage=1, device={"kind": "cpu"}).write(tmp_path / "manifest.json")
    document = json.loads((tmp_path / "manifest.json").read_text())
    del document["device"]
    (tmp_path / "manifest.json").write_text(json.dumps({**document, "format_version": 3}))
    manifest = Manifest.read(tmp_path / "manifest.json")
    assert (manifest.device, manifest.format_version) == (None, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 5, "cl_dist_version": "9", "new": 1}, r"has format 5, written by cl_dist 9; .* up to 4"),
        ({"completed": 4}, "is damaged: manifest: Value error, completed is 4 of 3 tasks"),
        ({"completed": -1}, "completed is -1 of 3 tasks"),
        (
            {"checkpoints": [{"task": 2, "step": 1, "folder": "x"}]},
            "the checkpoint belongs to task 2, but 0 are completed",
        ),
        ({"status": "asleep"}, "is damaged: status: Input should be 'running'"),
        ({"tasks": None}, "is damaged: tasks: "),
        ({"surprise": 1}, "is damaged: surprise: "),
        ({"accuracy_matrix": [["high"]]}, r"is damaged: accuracy_matrix\.0\.0: "),
        ({"accuracy_matrix": [[0.5, 0.5]]}, "a row of the accuracy matrix does not have 3 scores, one per task"),
        ({"accuracy_matrix": [[0.5] * 3] * 2}, "the accuracy matrix has 2 rows, 0 tasks are completed"),
    ],
)
def test_a_bad_manifest_is_named(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = tmp_path / "manifest.json"
    MANIFEST.write(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(BadInput, match=message) as caught:
        Manifest.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"), [("{", "Expecting"), ("[1]", "it is not a JSON object"), ("", "Expecting")]
)
def test_what_is_no_json_object_is_damaged(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=f"is damaged: {reason}"):
        Manifest.read(tmp_path / "manifest.json")


def test_what_the_system_does_not_give_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("cl_dist.state.integrity.time.sleep", pauses.append)
    path = tmp_path / "manifest.json"
    path.symlink_to(path)
    with pytest.raises(BadInput, match=r"manifest\.json cannot be read: Too many levels of symbolic links"):
        Manifest.read(path)
    assert pauses


def test_a_missing_manifest_means_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"manifest\.json is missing: .* holds no run"):
        Manifest.read(tmp_path / "manifest.json")


def test_the_newest_task_is_taken_back() -> None:
    """Everything about the task and its successor is removed; what came before stays."""
    rows = ((0.1, 0.2, 0.3), (0.9, 0.2, None), (0.8, 0.9, None))
    measured = ({"after": "untouched", "scores": {}}, {"after": "a", "scores": {}}, {"after": "b", "scores": {}})
    before = replace(
        MANIFEST, completed=1, accuracy_matrix=rows[:2], general=measured[:2], timings=({"steps": 1},), restarts=2,
        segments=(SEGMENT,), peak_memory_bytes=(5, 6),
    )  # fmt: skip
    after = replace(
        before, status="interrupted", completed=2, accuracy_matrix=rows, general=measured,
        timings=({"steps": 1}, {"steps": 2}), checkpoints=(CheckpointEntry(task=2, step=4, folder="checkpoint/x"),),
        row_under_way=(0.5, None, None), general_under_way={"hellaswag": {}},
    )  # fmt: skip
    assert after.taken_back() == before
