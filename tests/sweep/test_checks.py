"""The state of a cell's run; tests/cli/test_compare.py has the recipes and inputs that one table must not mix."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.state.lock import RunLock
from cl_dist.sweep.checks import CellState, state_of
from tests.sweep.cells import finish, make_grid, matrix, stop_half_way


def test_the_state_of_every_kind_of_run(tmp_path: Path) -> None:
    finished, interrupted, killed, missing = make_grid(tmp_path).cells
    finish(finished, matrix(1, 1, 1))
    stop_half_way(interrupted, matrix(1, 1, 1))
    stop_half_way(killed, matrix(1, 1, 1), "running")
    assert [str(state_of(cell.folder)) for cell in (finished, interrupted, killed, missing)] == [
        "finished",
        "interrupted, 1 of 2 tasks done",
        "killed, 1 of 2 tasks done",
        "missing",
    ]
    assert state_of(finished.folder).finished


def test_a_locked_folder_is_in_use_unless_its_run_is_finished(tmp_path: Path) -> None:
    finished, running, starting, _ = make_grid(tmp_path).cells
    finish(finished, matrix(1, 1, 1))
    stop_half_way(running, matrix(1, 1, 1), "running")
    starting.folder.path.mkdir(parents=True)
    for cell, expected in (
        (finished, CellState("finished", 2, 2)),
        (running, CellState("in use", 1, 2)),
        (starting, CellState("in use")),
    ):
        with RunLock(cell.folder.lock):
            assert state_of(cell.folder) == expected


def test_a_damaged_manifest_is_bad_input(tmp_path: Path) -> None:
    cell = make_grid(tmp_path).cells[0]
    finish(cell, matrix(1, 1, 1))
    cell.folder.manifest.write_text("{")
    with pytest.raises(BadInput, match=r"manifest\.json is damaged"):
        state_of(cell.folder)
