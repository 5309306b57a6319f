"""What is common to all formats: paths, limits, kinds and labels."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cl_dist.config.schema import StreamConfig, TaskConfig
from cl_dist.tasks.stream import load_stream
from tests.tasks.data import as_lines, load_one, records, write_lines


def write_task(folder: Path, count: int = 6) -> None:
    """A JSON Lines task with `count` training and 4 test samples."""
    write_lines(folder / "train.jsonl", as_lines(records("input", "output", count)))
    write_lines(folder / "test.jsonl", as_lines(records("input", "output", 4, "t")))


def test_paths_absolute_below_root_and_beside_the_recipe(tmp_path: Path) -> None:
    write_task(tmp_path / "abs/t", 5)
    write_task(tmp_path / "recipes/data/t", 6)
    write_task(tmp_path / "recipes/t", 7)
    recipes = tmp_path / "recipes"
    counts = [
        len(load_one(recipes, path=str(tmp_path / "abs/t"), stream={"root": "data"}).train),
        len(load_one(recipes, path="t", stream={"root": "data"}).train),
        len(load_one(recipes, path="t").train),
        len(load_one(recipes, stream={"root": str(recipes / "t")}).train),
    ]
    assert counts == [5, 6, 7, 7]


def test_limits_take_the_first_samples(tmp_path: Path) -> None:
    write_task(tmp_path / "t")
    task = load_one(tmp_path, path="t", stream={"max_train_samples": 3, "max_eval_samples": 1})
    assert [e.prompt for e in task.train] == ["question 0", "question 1", "question 2"]
    assert [e.prompt for e in task.evaluation] == ["question t0"]


def test_labels_do_not_depend_on_limits(tmp_path: Path) -> None:
    write_task(tmp_path / "t")
    task = load_one(tmp_path, path="t", stream={"max_train_samples": 1, "max_eval_samples": 1})
    assert (task.kind, task.labels) == ("classification", ("no", "yes"))


@pytest.mark.parametrize(
    ("answers", "most", "labels"),
    [
        (["a", "b", "a"], 50, ("a", "b")),  # 2 labels for 6 samples (the file serves twice)
        (["a", "b"], 50, ()),  # 2 for 4: half of the samples
        (["a", "b", "c"] * 4, 2, ()),  # more than max_labels
        (["a", "b", "c"] * 4, 3, ("a", "b", "c")),
        ([f"answer {i}" for i in range(20)], 50, ()),
        (["a", "a", "a"], 50, ()),  # nothing to tell apart
    ],
)
def test_kind_follows_from_the_answers(tmp_path: Path, answers: list[str], most: int, labels: tuple[str, ...]) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines([{"input": "q", "output": answer} for answer in answers]))
    task = load_one(tmp_path, path="a.jsonl", stream={"max_labels": most})
    assert task.labels == labels
    assert task.kind == ("classification" if labels else "generation")


def test_stated_labels_keep_their_order(tmp_path: Path) -> None:
    write_task(tmp_path / "t")
    assert load_one(tmp_path, path="t", labels=("yes", "no", "maybe")).labels == ("yes", "no", "maybe")


def test_tasks_keep_the_order_of_the_stream(tmp_path: Path) -> None:
    names = ("winter", "spring", "noon")
    stream = StreamConfig(tasks=tuple(TaskConfig(name=name, format="builtin") for name in names))
    assert tuple(task.name for task in load_stream(stream, tmp_path)) == names


def test_checking_data_imports_neither_torch_nor_datasets() -> None:
    code = "import sys, cl_dist.tasks.stream; sys.exit(bool({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_stated_label_that_no_sample_has_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines(records("input", "output", 8)))
    assert load_one(tmp_path, path="a.jsonl", labels=("yes", "no")).labels == ("yes", "no")
    assert "no sample has" not in caplog.text
    assert load_one(tmp_path, path="a.jsonl", labels=("yes", "no", "mabye")).labels == ("yes", "no", "mabye")
    assert "task 'task': no sample has the label mabye" in caplog.text
