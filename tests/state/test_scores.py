"""The scores of a run: after a kill at any moment, manifest and scores on disk are consistent."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_dist.errors import BadInput
from cl_dist.state import manifest as manifests
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import NOTHING_SCORED, Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.scores import ScoreFile, TaskScored

TASKS = ("a", "b", "c")
EMPTY = Manifest(tasks=TASKS, world_size=1, zero_stage=0)


def finish_row(ledger: Ledger, scores: list[float], **changes: Any) -> None:
    """Score all tasks one by one, then add the row to the matrix."""
    for task, score in enumerate(scores):
        ledger.scored(task, score)
    grown = ledger.manifest.with_row(ledger.manifest.row_under_way)
    ledger.update(**grown, completed=len(grown["accuracy_matrix"]) - 1, **changes)


def life(ledger: Ledger) -> None:
    """A run that is interrupted within a row, trains its second task again, and finishes."""
    ledger.start("recipe")
    finish_row(ledger, [0.1, 0.2, 0.3])
    finish_row(ledger, [0.9, 0.25, 0.35])
    ledger.scored(1, 0.5)
    ledger.update(status="interrupted")
    ledger.update(status="running")
    finish_row(ledger, [0.8, 0.75, 0.4])
    ledger.replace(ledger.manifest.taken_back())
    ledger.scored(0, 0.125)
    ledger.update(**NOTHING_SCORED)  # the model was trained again: its scores are void
    finish_row(ledger, [0.7, 0.625, 0.5])
    finish_row(ledger, [0.6, 0.5, 1.0], status="finished")


def known(manifest: Manifest) -> tuple[Any, ...]:
    return manifest.status, manifest.completed, manifest.accuracy_matrix, manifest.row_under_way


def test_every_prefix_of_the_writes_is_a_state_of_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder is copied before and after every write, and with half of it; each copy reads as the state before the
    operation that it is a part of, or as the one after it.
    """
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    ledger = Ledger(folder, EMPTY, writer=True)
    copies: list[tuple[Path, int]] = []
    states = [known(EMPTY)]

    def keep(torn: bool = False) -> None:
        copy = tmp_path / f"copy{len(copies)}"
        shutil.copytree(folder.path, copy)
        scores = copy / "scores.jsonl"
        if torn:
            scores.write_bytes(scores.read_bytes()[:-9])
        if (now := known(ledger.manifest)) != states[-1]:
            states.append(now)
        copies.append((copy, len(states) - 1))

    append, write = ScoreFile._append, manifests.write_json  # type: ignore[attr-defined]

    def appending(self: ScoreFile, records: Any) -> tuple[int, ...]:
        keep()
        places = append(self, records)
        if records:
            keep(torn=True)
            keep()
        return places

    def writing(path: Path, value: Any) -> None:
        keep()
        write(path, value)
        keep()

    monkeypatch.setattr(ScoreFile, "_append", appending)
    monkeypatch.setattr(manifests, "write_json", writing)
    life(ledger)
    final = known(ledger.manifest)
    states.append(final)
    seen = set()
    for copy, before in copies:
        if (copy / "manifest.json").exists():
            found = known(Manifest.read(copy / "manifest.json"))
            assert found in states[before : before + 2], copy
            seen.add(found)
    assert seen == set(states)
    assert final == ("finished", 3, ((0.1, 0.2, 0.3), (0.9, 0.25, 0.35), (0.7, 0.625, 0.5), (0.6, 0.5, 1.0)), ())


def test_after_a_kill_the_row_goes_on(tmp_path: Path) -> None:
    """The next score is not appended to a line that was cut off."""
    folder = RunFolder(tmp_path)
    ledger = Ledger(folder, EMPTY, writer=True)
    ledger.start("recipe")
    ledger.scored(0, 0.5)
    ledger.scored(1, 0.75)
    scores = tmp_path / "scores.jsonl"
    scores.write_bytes(scores.read_bytes()[:-5])
    again = Ledger(folder, Manifest.read(folder.manifest), writer=True)
    assert again.manifest.row_under_way == (0.5, None, None)
    again.update(status="running")
    finish_row(again, [0.5, 0.25, 1.0])
    assert Manifest.read(folder.manifest).accuracy_matrix == ((0.5, 0.25, 1.0),)


def test_cut_answers_are_kept_for_every_row(tmp_path: Path) -> None:
    """Also over an interruption within a row; None where nothing was generated or evaluated."""
    folder = RunFolder(tmp_path)
    ledger = Ledger(folder, EMPTY, writer=True)
    ledger.start("recipe")
    finish_row(ledger, [0.1, 0.2, 0.3])
    cuts: list[list[int | None]] = [[4, None, None], [0, None, 2]]
    for cut in cuts:
        for task in (0, 1):
            ledger.scored(task, 0.5, {} if cut[task] is None else {"cut_generations": cut[task]})  # type: ignore[dict-item]
        ledger = Ledger(folder, Manifest.read(folder.manifest), writer=True)
        if cut[2] is not None:
            ledger.scored(2, 0.25, {"cut_generations": cut[2]})
        ledger.update(
            **ledger.manifest.with_row(ledger.manifest.row_under_way), completed=ledger.manifest.completed + 1
        )
    expected = ((), (4, None, None), (0, None, 2))
    again = Manifest.read(folder.manifest)
    assert (ledger.manifest.cut_matrix, again.cut_matrix) == (expected, expected)
    back = Ledger(folder, again.taken_back(), writer=True)
    # The task was trained again: the same scores, but more answers were cut.
    for task, score in enumerate((0.5, 0.5, 0.25)):
        back.scored(task, score, {"cut_generations": 7} if task == 0 else {})
    back.update(**back.manifest.with_row(back.manifest.row_under_way), completed=2)
    last = Manifest.read(folder.manifest)
    assert (last.accuracy_matrix, last.cut_matrix[-1]) == (again.accuracy_matrix, (7, None, 2))
    lines = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [line["cut"] for line in lines if "cut" in line] == [[4, None, None], [0, None, 2], [7, None, 2]]
    assert "cut_matrix" not in json.loads(folder.manifest.read_text())


def test_a_score_costs_a_line(tmp_path: Path) -> None:
    """For any number of tasks; and the manifest does not grow with the scores of a task."""
    names = tuple(f"task-{number}" for number in range(200))
    folder = RunFolder(tmp_path)
    ledger = Ledger(folder, replace(EMPTY, tasks=names), writer=True)
    ledger.start("recipe")
    before = folder.manifest.stat()
    for task in range(200):
        ledger.scored(task, task / 200)
    assert folder.manifest.stat().st_ino == before.st_ino, "it was not replaced"
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    assert len(lines) == 200
    assert max(map(len, lines)) < 60
    row = ledger.manifest.row_under_way
    ledger.update(accuracy_matrix=(row,), **NOTHING_SCORED)
    assert folder.manifest.stat().st_size < before.st_size + 40
    assert Manifest.read(folder.manifest).accuracy_matrix == (row,)


def test_a_manifest_with_the_scores_in_it_is_read_and_they_move(tmp_path: Path) -> None:
    """A manifest of format 2."""
    path = tmp_path / "manifest.json"
    replace(EMPTY, completed=1).write(path)
    old = {"accuracy_matrix": [[0.1, None, None], [0.5, 0.25, None]], "row_under_way": [0.75, None, None]}
    path.write_text(json.dumps(json.loads(path.read_text()) | old | {"format_version": 2}))
    read = Manifest.read(path)
    assert read.accuracy_matrix == ((0.1, None, None), (0.5, 0.25, None))
    assert read.row_under_way == (0.75, None, None)
    read.write(path)
    assert json.loads(path.read_text())["accuracy_matrix"] == [0, 43]
    assert Manifest.read(path) == read


def damage(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def harm(path: Path) -> None:
        path.write_bytes(change(path.read_bytes()))

    return harm


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (Path.unlink, r"scores\.jsonl is missing, and it holds the run's scores"),
        (damage(lambda content: content.replace(b"0.25", b"0.26")), r"scores\.jsonl is damaged: row 1 of the accuracy"),
        (damage(lambda content: content[:-4]), r"scores\.jsonl is damaged: row 1 of the accuracy matrix is not at"),
        (damage(lambda content: b"x" + content), r"scores\.jsonl is damaged: row 0"),
        (damage(lambda content: b"\0" * len(content)), r"scores\.jsonl is damaged: row 0"),
    ],
)
def test_damaged_scores_are_named(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "manifest.json"
    replace(EMPTY, completed=1, accuracy_matrix=((0.5, None, None), (0.5, 0.25, None))).write(path)
    assert Manifest.read(path).completed == 1
    harm(tmp_path / "scores.jsonl")
    with pytest.raises(BadInput, match=message):
        Manifest.read(path)


def test_a_line_that_was_cut_off_harms_no_other(tmp_path: Path) -> None:
    """Rows and scores appended directly after it can be read."""
    file = ScoreFile(tmp_path / "scores.jsonl")
    file.append_scores([TaskScored(0, 0.5, {})])
    file.path.write_bytes(file.path.read_bytes()[:-5])
    assert file.rows(file.append_rows([(0.1,), (0.2,)])) == ((0.1,), (0.2,))
    file.path.write_bytes(file.path.read_bytes()[:-5])
    begin = file.end()
    file.append_scores([TaskScored(1, 0.75, {})])
    assert list(file.scores_after(begin)) == [TaskScored(1, 0.75, {})]
