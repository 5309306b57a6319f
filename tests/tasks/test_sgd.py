"""Format sgd: services, the files that say what makes up a turn, and limits that leave turns whole."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from cl_dist.errors import BadInput
from cl_dist.tasks.types import Slot
from tests.tasks.data import load_one, write_json, write_lines

TURNS = ("2", "2", "4", "4", "4", "6")
SLOTS = ("day", "time", "day", "time", "place", "day")


def samples(count: int = len(TURNS)) -> list[dict[str, str]]:
    """Records as the public files have them."""
    return [{"input": f"track slot {n}\n[USER]: hello {n}\n", "output": f"value {n}"} for n in range(count)]


def index() -> list[str]:
    """The lines of the index of `samples`."""
    return [f"1_00001|||1_00001|||{turn}|||none|||buses_1|||{slot}" for turn, slot in zip(TURNS, SLOTS, strict=True)]


def write_service(root: Path, name: str = "sgd_buses_1", folder: str = "SGD_single_service_{}") -> None:
    """One service with a training and a test file."""
    for split in ("train", "test"):
        at = root / folder.format(split)
        write_json(at / f"{name}-{split}-LLM_T5.json", samples())
        write_lines(at / f"{name}-{split}.idx", index())


def load(root: Path, name: str = "sgd_buses_1", **stream: Any) -> Any:
    """The service below `root`."""
    return load_one(root, name, stream, format="sgd", path=".")


@pytest.mark.parametrize("folder", ["SGD_single_service_{}", "{}", "SGD_single_service_{}_T5", "."])
@pytest.mark.parametrize("name", ["sgd_buses_1", "buses_1", "SGD_Buses_1"])
def test_a_service_is_found_whatever_its_folders_are_called(tmp_path: Path, folder: str, name: str) -> None:
    write_service(tmp_path, folder=folder)
    write_service(tmp_path, "sgd_buses_10", folder)
    task = load(tmp_path, name)
    assert task.kind == "generation"
    assert [example.answer for example in task.train] == [record["output"] for record in samples()]
    assert task.evaluation[3].prompt == samples()[3]["input"]
    assert task.evaluation[3].slot == Slot("1_00001-4", "buses_1-time")


def test_a_service_with_few_values_is_still_no_classification(tmp_path: Path) -> None:
    write_service(tmp_path)
    few = [{**record, "output": "none"} for record in samples() * 10]
    write_json(tmp_path / "SGD_single_service_train/sgd_buses_1-train-LLM_T5.json", few)
    assert load(tmp_path).labels == ()


@pytest.mark.parametrize(("most", "kept"), [(1, 2), (2, 2), (3, 5), (5, 5), (6, 6), (99, 6)])
def test_a_limit_does_not_cut_a_turn(tmp_path: Path, most: int, kept: int) -> None:
    write_service(tmp_path)
    assert len(load(tmp_path, max_eval_samples=most).evaluation) == kept


def test_an_empty_value_is_scored_but_not_learnt_where_it_is_skipped(tmp_path: Path) -> None:
    write_service(tmp_path)
    emptied = [{**record, "output": ""} if number == 3 else record for number, record in enumerate(samples())]
    for split in ("train", "test"):
        write_json(tmp_path / f"SGD_single_service_{split}/sgd_buses_1-{split}-LLM_T5.json", emptied)
    task = load(tmp_path, empty_answers="skip")
    assert (len(task.train), len(task.evaluation)) == (5, 6)
    assert task.evaluation[4].slot.name == "buses_1-place"
    with pytest.raises(BadInput, match=r"-test-LLM_T5.json, record 3: field 'output' is empty; stream.empty_answers"):
        load(tmp_path)


def test_capitals_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_service(tmp_path)
    with caplog.at_level(logging.WARNING):
        load(tmp_path)
        assert not caplog.records
        capital = [{**record, "output": "Value"} for record in samples()]
        write_json(tmp_path / "SGD_single_service_test/sgd_buses_1-test-LLM_T5.json", capital)
        load(tmp_path)
    assert "6 answers have capitals" in caplog.text


TEST = "SGD_single_service_test/sgd_buses_1-test"
BROKEN: list[tuple[Any, str]] = [
    (lambda root: (root / f"{TEST}.idx").unlink(), f"no file or folder .*{TEST}.idx; .*LLM_T5.json"),
    (lambda root: write_lines(root / f"{TEST}.idx", index()[:-1]), "has 5 lines, but .* has 6 records"),
    (lambda root: write_lines(root / f"{TEST}.idx", [*index()[:2], "", *index()[3:]]), "idx, line 3: must be file"),
    (lambda root: write_lines(root / f"{TEST}.idx", ["a|||b"] * 6), r"idx, line 1: must be .*, not 'a\|\|\|b'"),
    (lambda root: (root / f"{TEST}-LLM_T5.json").unlink(), f"no file or folder .*{TEST}-LLM_T5.json"),
    (lambda root: write_service(root, "sgd_trains_1", "other_{}"), None),
    (lambda root: write_service(root, folder="other_{}"), "'sgd_buses_1' is ambiguous below"),
    (lambda root: (root / "SGD_single_service_train").rename(root / "x"), None),
]


@pytest.mark.parametrize(("damage", "problem"), BROKEN)
def test_files_that_do_not_match(tmp_path: Path, damage: Any, problem: str | None) -> None:
    write_service(tmp_path)
    damage(tmp_path)
    if problem is None:
        assert len(load(tmp_path).evaluation) == 6
        return
    with pytest.raises(BadInput, match=problem):
        load(tmp_path)


def test_an_unknown_service_lists_those_that_are_there(tmp_path: Path) -> None:
    write_service(tmp_path)
    with pytest.raises(BadInput, match=r"no file sgd_homes_1-train-LLM_T5.json in .*; services: sgd_buses_1"):
        load(tmp_path, "sgd_homes_1")


def test_labels_are_refused(tmp_path: Path) -> None:
    write_service(tmp_path)
    with pytest.raises(BadInput, match="labels are stated, but the task is generation"):
        load_one(tmp_path, "sgd_buses_1", format="sgd", path=".", labels=("a", "b"))
