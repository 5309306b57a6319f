from __future__ import annotations

import json
from pathlib import Path

import pytest

from cl_dist.state import data_order
from cl_dist.state.data_order import DataOrder

TASKS = ("spring", "summer")


def lines(path: Path) -> list[tuple[str, int]]:
    return [(record["task"], record["step"]) for record in map(json.loads, path.read_text().splitlines())]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The file of a run that was killed during its second task."""
    order = DataOrder(tmp_path / "data_order.jsonl", TASKS, writer=True)
    order.append(0, 1, [3, 1])
    order.append(0, 2, [0, 2], skipped=True)
    for step in (1, 2, 3):
        order.append(1, step, [step])
    return tmp_path / "data_order.jsonl"


def test_a_line_says_what_a_step_has_learnt(path: Path) -> None:
    first, second, *_ = map(json.loads, path.read_text().splitlines())
    assert first == {"task": "spring", "step": 1, "samples": [3, 1]}
    assert second == {"task": "spring", "step": 2, "samples": [0, 2], "skipped": True}


@pytest.mark.parametrize(("task", "step", "left"), [(1, 3, 5), (1, 1, 3), (1, 0, 2), (0, 1, 1), (0, 0, 0)])
def test_a_resumed_run_takes_back_what_it_repeats(path: Path, task: int, step: int, left: int) -> None:
    before = lines(path)
    DataOrder(path, TASKS, writer=True).rewind(task, step)
    assert lines(path) == before[:left]


def test_a_line_that_a_kill_cut_off_goes_with_all_after_it(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    order = DataOrder(path, TASKS, writer=True)
    order.rewind(1, 3)
    order.append(1, 3, [3])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("step", [0, 1, 49, 50])
def test_taking_back_reads_only_what_it_removes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, step: int
) -> None:
    monkeypatch.setattr(data_order, "_BLOCK", block)
    order = DataOrder(tmp_path / "data_order.jsonl", TASKS, writer=True)
    for number in range(1, 51):
        order.append(0, number, range(number))
    content = (tmp_path / "data_order.jsonl").read_bytes()
    with (tmp_path / "data_order.jsonl").open("r+b") as file:
        file.write(b"?")  # what is kept is not looked at
    order.rewind(0, step)
    lines = content.splitlines(keepends=True)
    left = (tmp_path / "data_order.jsonl").read_bytes()
    assert left == (b"?" + content[1:])[: sum(map(len, lines[:step]))] if step > 1 else left == b""


def test_only_the_writer_writes(path: Path) -> None:
    before = path.read_bytes()
    order = DataOrder(path, TASKS, writer=False)
    order.append(1, 4, [4])
    order.rewind(0, 0)
    order.sync()
    assert path.read_bytes() == before


def test_a_run_that_starts_has_nothing_to_take_back(tmp_path: Path) -> None:
    order = DataOrder(tmp_path / "data_order.jsonl", TASKS, writer=True)
    order.rewind(0, 0)
    order.sync()
    assert list(tmp_path.iterdir()) == []
