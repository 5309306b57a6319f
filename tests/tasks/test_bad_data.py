"""Unusable data: each case with the sentence that the user gets."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from cl_dist.errors import BadInput
from tests.tasks.data import as_lines, load_one, records, write_json, write_lines

GOOD = records("input", "output", 6)


def refuse(recipe_dir: Path, *fragments: str, **task: Any) -> str:
    """Load a task that must be refused; the message names the task, has all fragments and is one line."""
    with pytest.raises(BadInput) as caught:
        load_one(recipe_dir, **task)
    message = str(caught.value)
    assert message.startswith(f"task {task.get('name', 'task')!r}: ")
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message
    return message


RECORDS: list[tuple[object, str]] = [
    ("text", "must be an object with 'input' and 'output', not a string"),
    (["a", "b"], "must be an object with 'input' and 'output', not a list"),
    (None, "must be an object with 'input' and 'output', not null"),
    ({"input": "q"}, "no field 'output'; the record has: input"),
    ({"input": "q", "output": 3}, "field 'output' must be a string, not a number"),
    ({"input": "q", "output": True}, "field 'output' must be a string, not a boolean"),
    ({"input": {"a": 1}, "output": "a"}, "field 'input' must be a string, not an object"),
    ({"input": "q", "output": "  "}, "field 'output' is empty"),
    ({"input": "", "output": "a"}, "field 'input' is empty"),
    ({"input": "q \ud83d", "output": "a"}, "field 'input' holds half a surrogate pair at character 2"),
]


@pytest.mark.parametrize(("record", "problem"), RECORDS)
def test_broken_record_is_named_by_its_line(tmp_path: Path, record: object, problem: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", ["", *as_lines([GOOD[0], record])])
    refuse(tmp_path, f"{file}, line 3: {problem}", path="a.jsonl")


@pytest.mark.parametrize(("record", "problem"), RECORDS)
def test_broken_record_is_named_by_its_index(tmp_path: Path, record: object, problem: str) -> None:
    write_json(tmp_path / "train/task_T5.json", GOOD)
    file = write_json(tmp_path / "test/task_T5.json", [*GOOD, record])
    refuse(tmp_path, f"{file}, record 6: {problem}", format="tasl", path=".")


def test_broken_record_beyond_the_sample_limit_is_found(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines([GOOD[0], {"input": "q"}]))
    refuse(tmp_path, "line 2: no field 'output'", path="a.jsonl", stream={"max_train_samples": 1})


def test_bad_json_line(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [*as_lines(GOOD[:2]), '{"input": '])
    refuse(tmp_path, f"{file}, line 3: not valid JSON (Expecting value, column 11)", path="a.jsonl")


def test_bad_json_file(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "train/task_T5.json", ["[", '  {"input" "q"}', "]"])
    write_json(tmp_path / "test/task_T5.json", GOOD)
    refuse(tmp_path, f"{file}, line 2: not valid JSON (Expecting ':' delimiter, column 12)", format="tasl", path=".")


def test_deep_json(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", ["[" * 200_000])
    refuse(tmp_path, "line 1: JSON nested too deeply", path="a.jsonl")


def test_not_a_list(tmp_path: Path) -> None:
    file = write_json(tmp_path / "train/task_T5.json", {"data": GOOD})
    write_json(tmp_path / "test/task_T5.json", GOOD)
    refuse(tmp_path, f"{file} must hold a JSON list, not an object", format="tasl", path=".")


def test_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"input": "q", "output": "a"}\n{"input": "caf\xe9", "output": "a"}\n')
    refuse(tmp_path, f"{tmp_path / 'a.jsonl'}, line 2: not UTF-8 text (byte 0xe9)", path="a.jsonl")


def test_empty_split(tmp_path: Path) -> None:
    write_json(tmp_path / "train/task_T5.json", GOOD)
    file = write_json(tmp_path / "test/task_T5.json", [])
    refuse(tmp_path, f"{file} holds no samples", format="tasl", path=".")


def test_empty_text_file(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.txt", ["", " "])
    refuse(tmp_path, f"{file} holds no samples", format="text", path="a.txt")


def test_missing_path_lists_what_is_there(tmp_path: Path) -> None:
    write_lines(tmp_path / "data/other.jsonl", ["{}"])
    path = tmp_path / "data/mine.jsonl"
    refuse(tmp_path, f"no file or folder {path}; {path.parent} has: other.jsonl", path="data/mine.jsonl")


def test_missing_tasl_task_lists_the_tasks(tmp_path: Path) -> None:
    for name in ("b", "a"):
        write_json(tmp_path / f"train/{name}_T5.json", GOOD)
    refuse(tmp_path, f"no file {tmp_path}/train/task_T5.json; the folder has tasks: a, b", format="tasl", path=".")


def test_missing_trace_task_lists_the_tasks(tmp_path: Path) -> None:
    write_json(tmp_path / "science/train.json", records("prompt", "answer", 6))
    refuse(tmp_path, f"no task 'task' in {tmp_path}; the folder has tasks: science", format="trace", path=".")


def test_missing_evaluation_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "d/train.jsonl", as_lines(GOOD))
    refuse(tmp_path, f"no file or folder {tmp_path}/d/test.jsonl; {tmp_path}/d has: train.jsonl", path="d")


def test_missing_training_file(tmp_path: Path) -> None:
    write_lines(tmp_path / "d/test.jsonl", as_lines(GOOD))
    refuse(tmp_path, f"no file or folder {tmp_path}/d/train.jsonl; {tmp_path}/d has: test.jsonl", path="d")


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    refuse(tmp_path, "d has: nothing", format="text", path="d")


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    file = write_json(tmp_path / "a.json", GOOD)
    refuse(tmp_path, f"{file} is a file, but this format needs a folder", format="tasl", path="a.json")


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "train/task_T5.json").mkdir(parents=True)
    write_json(tmp_path / "test/task_T5.json", GOOD)
    refuse(tmp_path, "task_T5.json cannot be read: Is a directory", format="tasl", path=".")


def test_no_path(tmp_path: Path) -> None:
    refuse(tmp_path, "format 'auto' needs a path: set `path` of the task or `stream.root`")


def test_builtin_name_and_path(tmp_path: Path) -> None:
    refuse(tmp_path, "no built-in task has this name; allowed: autumn, dawn,", format="builtin")


def test_text_has_no_labels(tmp_path: Path) -> None:
    refuse(tmp_path, "labels are stated, but the task is text", name="prose", format="builtin", labels=("a", "b"))


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (("yes", "maybe"), "a.jsonl, line 2: answer 'no' is not one of the labels maybe, yes"),
        (("yes",), "1 label(s) stated; a classification task needs at least two"),
        (("yes", "no", "yes"), "label 'yes' is stated twice"),
        (("yes", " no"), "label 1 is ' no'; a label must not be empty, nor start or end with white space"),
    ],
)
def test_stated_labels(tmp_path: Path, labels: tuple[str, ...], problem: str) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines(GOOD))
    refuse(tmp_path, problem, path="a.jsonl", labels=labels)


def cl_benchmark(root: Path) -> Path:
    """A small data set "task" of the group TC."""
    for split in ("train", "test"):
        write_json(root / f"TC/task/{split}.json", records("sentence", "label", 4))
    write_json(root / "TC/task/labels.json", ["yes", "no"])
    return root / "TC/task"


CL_BENCHMARK: list[tuple[Callable[[Path], object], str]] = [
    (lambda d: write_json(d / "labels.json", ["yes"]), "1 label(s) stated"),
    (lambda d: write_json(d / "labels.json", ["yes", "on"]), "record 1: answer 'no' is not one of the labels on, yes"),
    (
        lambda d: write_json(d / "labels.json", ["yes", 0]),
        "labels.json, record 1: a label must be a string, not a number",
    ),
    (lambda d: write_json(d / "labels.json", "yes"), "labels.json must hold a JSON list, not a string"),
    (lambda d: (d / "labels.json").unlink(), "labels.json; "),
    (lambda d: (d / "test.json").unlink(), "no file or folder "),
    (lambda d: d.rename(d.parent / "other"), "no data set 'task' below"),
    (lambda d: d.parent.rename(d.parents[1] / "XY"), "known groups are BoolQA, MultiRC, NLI, QQP, SC, TC, WiC"),
    (lambda d: (d / "train.json").unlink(), "train.json; "),
    (lambda d: cl_benchmark(d.parents[1] / "x").parent.rename(d.parents[1] / "SC"), "'task' is ambiguous below"),
    (lambda d: write_json(d / "instruction_config.json", []), "must hold a JSON object of groups, not a list"),
    (lambda d: write_json(d / "instruction_config.json", {"TC": "Pick."}), "group 'TC' must be a list of objects"),
]


@pytest.mark.parametrize(("damage", "problem"), CL_BENCHMARK)
def test_cl_benchmark(tmp_path: Path, damage: Callable[[Path], object], problem: str) -> None:
    damage(cl_benchmark(tmp_path / "bench"))
    refuse(tmp_path, problem, format="cl_benchmark", path="bench")


def save_splits(folder: Path, **splits: dict[str, list[Any]]) -> None:
    """A data set dictionary saved by the `datasets` library."""
    datasets = pytest.importorskip("datasets")
    made = {name: datasets.Dataset.from_dict(columns) for name, columns in splits.items()}
    datasets.DatasetDict(made).save_to_disk(str(folder))


def test_huggingface_splits_and_columns(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    columns = {"input": ["q"], "output": ["a"]}
    save_splits(tmp_path / "no-train", test=columns)
    save_splits(tmp_path / "no-test", train=columns)
    save_splits(tmp_path / "no-column", train={"input": ["q"]}, test=columns)
    save_splits(tmp_path / "wrong", train={"input": ["q"], "output": [1]}, test=columns)
    refuse(tmp_path, "data set no-train has no split 'train'; it has: test", format="huggingface", path="no-train")
    refuse(
        tmp_path,
        "has no split to evaluate on",
        "it has: train; eval_fraction: 0.1 would",
        format="huggingface",
        path="no-test",
    )
    assert not caplog.records  # it is evaluated on nothing
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "single"))
    problem = "single is a single split, without one to evaluate on; eval_fraction: 0.1 would hold out a tenth"
    refuse(tmp_path, problem, format="huggingface", path="single")
    refuse(tmp_path, "no-column[train] has no column 'output'", format="huggingface", path="no-column")
    refuse(tmp_path, "wrong[train], record 0: field 'output' must be a string", format="huggingface", path="wrong")


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        (("input,output,output", "a,b,c"), "a.csv: column 'output' occurs twice"),
        (("input,output", "a,b", "c,"), "record 1: field 'output' is empty"),
        (("input,output", "a,b", "c"), "record 1: field 'output' is empty"),
    ],
)
def test_csv_files_with_a_column_twice_and_without_a_cell(tmp_path: Path, lines: tuple[str, ...], problem: str) -> None:
    pytest.importorskip("datasets")
    write_lines(tmp_path / "a.csv", lines)
    refuse(tmp_path, problem, format="huggingface", path="a.csv")


def test_dates_and_bytes_are_not_numbers(tmp_path: Path) -> None:
    save_splits(
        tmp_path / "dates",
        train={"input": ["q"], "output": [datetime(2024, 1, 2)]},
        test={"input": ["q"], "output": ["a"]},
    )
    refuse(tmp_path, "must be a string, not a datetime", format="huggingface", path="dates")


def test_huggingface_sample_without_a_class(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"input": datasets.Value("string"), "output": datasets.ClassLabel(names=["bad", "good"])}
    )
    split = datasets.Dataset.from_dict({"input": ["q", "r"], "output": [1, -1]}, features=features)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "saved"))
    problem = "saved[train], record 1: field 'output' must be a string, not null"
    refuse(tmp_path, problem, format="huggingface", path="saved")


def test_huggingface_path_that_can_only_be_a_folder_is_not_looked_up(tmp_path: Path) -> None:
    refuse(tmp_path, "no file or folder", format="huggingface", path="./absent/data/set")


def test_huggingface_reports_the_reason_of_the_library(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, "data set empty cannot be loaded: ", format="huggingface", path="empty")


def test_messages_show_few_of_many_names(tmp_path: Path) -> None:
    answers = [f"label {i:03d}" for i in range(60)]
    write_lines(tmp_path / "a.jsonl", as_lines([{"input": "q", "output": "other"}]))
    refuse(tmp_path, "label 019 and 40 more", path="a.jsonl", labels=tuple(answers))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "a.jsonl holds no samples"),
        (b'{"input": "q", "output": "a", "z": ' + b"9" * 5000 + b"}", "a.jsonl, line 1: a number with too many digits"),
        (b'{"input": "q", "output": "a", "output": "b"}', "a.jsonl, line 1: field 'output' is given twice"),
        (b'{"input": "q", "output": 1e999}', "a.jsonl, line 1: field 'output' must be a string, not a number"),
        (b'\n{"input": "q", "output": NaN}', "a.jsonl, line 2: field 'output' must be a string, not a number"),
        (b'{"input": "q\\ud800", "output": "a"}', "line 1: field 'input' holds half a surrogate pair at character 1"),
        (b'{"\\ud800": "q"}', "line 1: no field 'input'; the record has: \\ud800"),
        ('{"input": "q"}'.encode("utf-16"), "line 1: not UTF-8 text (it holds NUL bytes) (it looks like UTF-16: conv"),
        (b'{"input": "q"}\n\0', "a.jsonl, line 2: not UTF-8 text (it holds NUL bytes)"),
        (gzip.compress(b'{"input": "q"}', mtime=0), "(it looks like gzip: unpack it, or let its name end in .gz)"),
        (b"PAR1\x00\x01", "(it looks like Parquet: let its name end in .parquet)"),
    ],
)
def test_odd_bytes(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    refuse(tmp_path, problem, path="a.jsonl")


def test_a_number_of_too_many_digits_is_named_by_its_line(tmp_path: Path) -> None:
    write_json(tmp_path / "test/task_T5.json", GOOD)
    lines = ["[", '{"input": "q", "output": "a"},', '{"input": "q", "id": ' + "7" * 4301 + "}", "]"]
    file = write_lines(tmp_path / "train/task_T5.json", lines)
    refuse(tmp_path, f"{file}, line 3: a number with too many digits", format="tasl", path=".")


def test_an_empty_json_file(tmp_path: Path) -> None:
    write_json(tmp_path / "test/task_T5.json", GOOD)
    file = write_lines(tmp_path / "train/task_T5.json", [""])
    refuse(tmp_path, f"{file} is empty", format="tasl", path=".")


def test_text_in_another_encoding_without_a_mark(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one line\nanother\n".encode("utf-16-le"))
    refuse(tmp_path, "a.txt, line 1: not UTF-8 text (it holds NUL bytes)", format="text", path="a.txt")


def test_a_broken_test_file_is_not_replaced_by_the_other_split(tmp_path: Path) -> None:
    for split in ("train", "dev"):
        write_json(tmp_path / f"{split}/task_T5.json", GOOD)
    (tmp_path / "test/task_T5.json").mkdir(parents=True)
    refuse(tmp_path, "test/task_T5.json cannot be read: Is a directory", format="tasl", path=".")


@pytest.mark.parametrize("place", ["labels.json", "instruction_config.json"])
def test_a_lone_surrogate_outside_the_records(tmp_path: Path, place: str) -> None:
    folder = cl_benchmark(tmp_path / "bench")
    content: Any = ["yes", "no \ud800"] if place == "labels.json" else {"TC": [{"instruction": "\ud800 Pick."}]}
    write_json(folder / place, content)
    refuse(tmp_path, place, "holds half a surrogate pair at character", format="cl_benchmark", path="bench")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.jsonl", '{"input": "q"}\n{"z": ' + "[" * 300_000 + "]" * 300_000 + "}", "a.jsonl, line 2: JSON nested too"),
        ("a.json", '{"a": ' * 300_000, "a.json, line 1: JSON nested too deeply"),
        ("a.csv", 'input,output\n"never closed,1\n', "data set a.csv cannot be loaded: Error tokenizing data"),
        (
            "a.json",
            '[{"input": "q", "output": 0.5}]',
            "a.json[train], record 0: field 'output' must be a string, not a number",
        ),
        ("a.csv", "", "a.csv is empty"),
        ("a.parquet", "PAR1garbagePAR1", "data set a.parquet cannot be loaded: "),
    ],
)
@pytest.mark.parametrize("within", [False, True])
def test_huggingface_files_that_the_library_cannot_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str, problem: str, within: bool
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set" if within else tmp_path
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(content)
    message = refuse(tmp_path, format="huggingface", path="set" if within else name)
    assert within or problem in message
    assert "while generating" not in message
