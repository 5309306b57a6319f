"""Published orders and order folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig
from cl_dist.errors import BadInput
from cl_dist.tasks.orders import ORDERS, read_order, resolve_order
from tests.tasks.data import write_json


def write_stage(folder: Path, name: str, tested: list[str], learnt: list[str] | None = None) -> None:
    """One stage of an order folder."""
    for file, names in (("train", learnt or [name]), ("test", tested)):
        groups = {"SC": [], "TC": [{"sampling strategy": "full", "dataset name": other} for other in names]}
        write_json(folder / name / f"{file}_tasks.json", groups)


def test_orders_are_permutations_within_a_benchmark() -> None:
    assert {frozenset(ORDERS[order]) for order in "123"} == {frozenset(("dbpedia", "amazon", "yahoo", "agnews"))}
    assert len({frozenset(ORDERS[order]) for order in "456"}) == 1
    assert {order: len(set(names)) for order, names in ORDERS.items()} == {
        "1": 4, "2": 4, "3": 4, "4": 15, "5": 15, "6": 15, "superni-1": 15, "superni-2": 15,
            **{f"sgd-{number}": 15 for number in range(1, 7)},
    }  # fmt: skip


def test_order_follows_the_growing_test_lists_not_the_folder_names(tmp_path: Path) -> None:
    write_stage(tmp_path, "a", ["c", "a"])
    write_stage(tmp_path, "b", ["a", "c", "b"])
    write_stage(tmp_path, "c", ["c"])
    (tmp_path / "notes.txt").write_text("not a stage")
    assert read_order(tmp_path) == ["c", "a", "b"]


@pytest.mark.parametrize("tested", [["a"], ["b"], ["a", "x"], ["a", "b", "c"]])
def test_unclear_order(tmp_path: Path, tested: list[str]) -> None:
    write_stage(tmp_path, "a", ["a"])
    write_stage(tmp_path, "b", tested)
    with pytest.raises(BadInput, match="the order is unclear, because stage"):
        read_order(tmp_path)


def test_stage_that_learns_two(tmp_path: Path) -> None:
    write_stage(tmp_path, "a", ["a"], learnt=["a", "b"])
    with pytest.raises(BadInput, match=r"train_tasks\.json must name one data set, not a, b"):
        read_order(tmp_path)


def test_broken_order_folders(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"no file or folder .*train_tasks"):
        read_order(tmp_path)
    write_json(tmp_path / "a/train_tasks.json", {"TC": [{"name": "a"}]})
    with pytest.raises(BadInput, match="every entry must be an object with a text `dataset name`"):
        read_order(tmp_path)
    write_json(tmp_path / "a/train_tasks.json", [])
    with pytest.raises(BadInput, match="must hold a JSON object of groups, not a list"):
        read_order(tmp_path)


def test_a_published_order_becomes_tasks(tmp_path: Path) -> None:
    recipe = resolve_order(with_order("3", root="/data"), tmp_path)
    assert [task.name for task in recipe.stream.tasks] == ["yahoo", "amazon", "agnews", "dbpedia"]
    assert {(task.format, task.path) for task in recipe.stream.tasks} == {("tasl", "/data")}
    assert recipe.stream.order is None


def test_an_order_folder_next_to_the_recipe_becomes_tasks(tmp_path: Path) -> None:
    write_stage(tmp_path / "mine", "x", ["b"], learnt=["b"])
    write_stage(tmp_path / "mine", "y", ["b", "a"], learnt=["a"])
    recipe = resolve_order(with_order("mine", format="cl_benchmark"), tmp_path)
    assert [task.name for task in recipe.stream.tasks] == ["b", "a"]
    assert {(task.format, task.path) for task in recipe.stream.tasks} == {("cl_benchmark", str(tmp_path))}


def test_an_unknown_order_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"stream.order: '7' is neither a folder nor one of 1, 2, 3, 4, 5, 6, sgd-1"):
        resolve_order(with_order("7"), tmp_path)


def with_order(order: str, **stream: str) -> Recipe:
    """A recipe whose stream is an order."""
    return Recipe(
        model=ModelConfig(name_or_path="builtin:llama-tiny"),
        stream=StreamConfig(order=order, **stream),  # type: ignore[arg-type]
        output_dir="unused",
    )
