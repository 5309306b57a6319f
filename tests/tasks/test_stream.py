"""What all formats have in common: paths, limits, kinds and labels."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from cl_dist.config.schema import StreamConfig, TaskConfig, TrainConfig
from cl_dist.errors import BadInput
from cl_dist.tasks.stream import load_stream
from tests.tasks.data import as_lines, load_one, records, write_lines


def write_task(folder: Path, count: int = 6) -> None:
    """A JSON Lines task with `count` training and 4 test samples."""
    write_lines(folder / "train.jsonl", as_lines(records("input", "output", count)))
    write_lines(folder / "test.jsonl", as_lines(records("input", "output", 4, "t")))


def test_paths_absolute_below_root_and_next_to_the_recipe(tmp_path: Path) -> None:
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
        (["a", "b", "a", "b"], 50, ("a", "b")),
        (["a", "b", "a"], 50, ()),  # one of them once
        (["a", "b"], 50, ()),
        (["a", "b", "c"] * 4, 2, ()),  # more than max_labels
        (["a", "b", "c"] * 4, 3, ("a", "b", "c")),
        ([f"answer {i}" for i in range(20)], 50, ()),
        (["a", "a", "a"], 50, ()),  # nothing to tell apart
        ([f"city: {i % 20}" for i in range(399)], 50, ()),  # a list of names, each of which is there often
        ([f"topic {i % 20}" for i in range(400)], 50, tuple(sorted(f"topic {i}" for i in range(20)))),
        (["yes", "no"] * 500 + ["perhaps not today"], 50, ()),  # an answer that occurs once: there are others
    ],
)
def test_kind_follows_from_the_answers(tmp_path: Path, answers: list[str], most: int, labels: tuple[str, ...]) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines([{"input": "q", "output": answer} for answer in answers]))
    task = load_one(tmp_path, path="a.jsonl", stream={"max_labels": most})
    assert task.labels == labels
    assert task.kind == ("classification" if labels else "generation")


def test_evaluation_answers_do_not_become_labels_and_are_counted(tmp_path: Path) -> None:
    write_lines(tmp_path / "t/train.jsonl", as_lines([{"input": "q", "output": a} for a in ["yes", "no"] * 4]))
    write_lines(tmp_path / "t/test.jsonl", as_lines([{"input": "q", "output": a} for a in ["yes", "maybe", "never"]]))
    task = load_one(tmp_path, path="t")
    assert (task.labels, task.labels_from, task.unlisted) == (("no", "yes"), "training answers", 2)
    assert load_one(tmp_path, path="t", stream={"max_eval_samples": 2}).unlisted == 1


@pytest.mark.parametrize(
    ("answers", "labels", "warned"),
    [
        ([*"abcde"] * 4, None, True),  # five classes, but fewer than 25 samples
        (["yes", "no"] * 9 + ["maybe"], None, True),  # a class of one sample
        ([*"abcde"] * 5, None, False),  # taken for labels
        ([*"abcde"] * 4, (), False),  # said to be text
        ([*"abcde"] * 4, tuple("abcde"), False),  # said to be labels
        ([f"text {number}" for number in range(20)] + ["text 0"], None, False),  # text
        (["yes"] * 20, None, False),
    ],
)
def test_answers_that_may_have_been_meant_as_labels(
    tmp_path: Path, answers: list[str], labels: tuple[str, ...] | None, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "test"):
        write_lines(tmp_path / f"t/{split}.jsonl", as_lines([{"input": "q", "output": each} for each in answers]))
    with caplog.at_level(logging.WARNING):
        task = load_one(tmp_path, path="t", labels=labels)
    assert ("count as free text" in caplog.text) == warned
    assert not (warned and task.labels)


def test_an_empty_list_of_labels_makes_a_task_of_text(tmp_path: Path) -> None:
    write_task(tmp_path / "t")
    task = load_one(tmp_path, path="t", labels=())
    assert (task.kind, task.labels, task.labels_from) == ("generation", (), None)


@pytest.mark.parametrize("stated", [None, ("caf\u00e9", "th\u00e9"), ("cafe\u0301", "the\u0301")])
def test_labels_and_answers_that_look_the_same_are_the_same(tmp_path: Path, stated: tuple[str, ...] | None) -> None:
    answers = ["caf\u00e9", "the\u0301", "cafe\u0301", "th\u00e9"]
    write_lines(tmp_path / "a.jsonl", as_lines([{"input": "q", "output": answer} for answer in answers]))
    task = load_one(tmp_path, path="a.jsonl", labels=stated)
    assert task.labels == ("caf\u00e9", "th\u00e9")
    assert [each.answer for each in task.train] == ["caf\u00e9", "th\u00e9"] * 2


def test_a_label_that_is_stated_in_two_spellings(tmp_path: Path) -> None:
    write_task(tmp_path / "t")
    with pytest.raises(BadInput, match=r"is stated twice \(labels are compared in Unicode's normal form C"):
        load_one(tmp_path, path="t", labels=("yes", "no", "\u00e9", "e\u0301"))


@pytest.mark.parametrize(
    ("files", "path", "task", "split"),
    [
        (["t/train.jsonl", "t/test.jsonl"], "t", {}, "test"),
        (["t/train.jsonl", "t/validation.jsonl"], "t", {}, "dev"),
        (["test/train.jsonl", "test/dev.jsonl"], "test", {}, "dev"),
        (["a.jsonl", "a.dev.jsonl"], "a.jsonl", {}, "dev"),
        (["test.a.jsonl"], "test.a.jsonl", {}, "train"),
        (["dev/a.txt"], "dev/a.txt", {"format": "text"}, "train"),
        (["a/b.txt", "a/c.txt"], "a", {"format": "text"}, "train"),
        (["a/b.txt", "a/c.txt", "a/test.txt"], "a", {"format": "text"}, "test"),
    ],
)
def test_which_split_is_scored_is_known(
    tmp_path: Path, files: list[str], path: str, task: dict[str, str], split: str
) -> None:
    for file in files:
        write_lines(tmp_path / file, as_lines(records("input", "output", 4)))
    assert load_one(tmp_path, path=path, **task).scored_on == split


def test_stated_labels_keep_their_order(tmp_path: Path) -> None:
    write_task(tmp_path / "t")
    assert load_one(tmp_path, path="t", labels=("yes", "no", "maybe")).labels == ("yes", "no", "maybe")


def test_tasks_keep_the_order_of_the_stream(tmp_path: Path) -> None:
    names = ("winter", "spring", "noon")
    stream = StreamConfig(tasks=tuple(TaskConfig(name=name, format="builtin") for name in names))
    assert tuple(task.name for task in load_stream(stream, tmp_path, TrainConfig())) == names


def test_checking_data_imports_neither_torch_nor_datasets() -> None:
    code = "import sys, cl_dist.tasks.stream; sys.exit(bool({'torch', 'datasets', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_stated_label_that_no_sample_has_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines(records("input", "output", 8)))
    assert load_one(tmp_path, path="a.jsonl", labels=("yes", "no")).labels == ("yes", "no")
    assert "no sample has" not in caplog.text
    assert load_one(tmp_path, path="a.jsonl", labels=("yes", "no", "mabye")).labels == ("yes", "no", "mabye")
    assert "task 'task': no sample has the label mabye" in caplog.text
