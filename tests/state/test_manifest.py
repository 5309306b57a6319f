from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.state.manifest import CheckpointEntry, Manifest

MANIFEST = Manifest(tasks=("a", "b", "c"), world_size=2, zero_stage=3)


def test_a_manifest_comes_back_equal(tmp_path: Path) -> None:
    manifest = replace(
        MANIFEST,
        status="interrupted",
        completed=1,
        checkpoint=CheckpointEntry(task=1, step=40, folder="checkpoint/task-02-step-000040"),
        accuracy_matrix=((0.1, 0.2, None), (0.9, 0.2, None)),
        restarts=2,
        timings=({"train": 1.5, "evaluate": 0.25},),
    )
    manifest.write(tmp_path / "manifest.json")
    assert Manifest.read(tmp_path / "manifest.json") == manifest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2, "cl_dist_version": "9", "new": 1}, r"has format 2, written by cl_dist 9; .* up to 1"),
        ({"completed": 4}, "is damaged: manifest: Value error, completed is 4 of 3 tasks"),
        ({"completed": -1}, "completed is -1 of 3 tasks"),
        ({"checkpoint": {"task": 2, "step": 1, "folder": "x"}}, "the checkpoint is of task 2, 0 are completed"),
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
    ("text", "reason"), [("{", "Expecting"), ("[1]", "it holds no JSON object"), ("", "Expecting")]
)
def test_what_is_no_json_object_is_damaged(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BadInput, match=f"is damaged: {reason}"):
        Manifest.read(tmp_path / "manifest.json")


def test_a_missing_manifest_means_no_run(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"manifest\.json is missing: .* holds no run"):
        Manifest.read(tmp_path / "manifest.json")
