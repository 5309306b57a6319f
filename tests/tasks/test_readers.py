"""Every format, read from small files."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from cl_dist.errors import BadInput
from cl_dist.tasks.formats.cl_benchmark import PUBLISHED_INSTRUCTIONS
from tests.tasks.data import as_lines, load_one, records, write_json, write_lines


def cl_benchmark(root: Path, group: str = "TC", name: str = "news") -> Path:
    """A CL_Benchmark data set with 6 training and 4 test samples."""
    folder = root / group / name
    write_json(folder / "train.json", records("sentence", "label", 6))
    write_json(folder / "test.json", records("sentence", "label", 4, "t"))
    write_json(folder / "labels.json", ["yes", "no"])
    return folder


def test_cl_benchmark_prompt_has_instruction_options_sentence_and_cue(tmp_path: Path) -> None:
    cl_benchmark(tmp_path)
    task = load_one(tmp_path, "news", format="cl_benchmark", path=".")
    instruction = "What is the topic of the following paragraph? Choose one from the option.\n"
    assert task.train[1].prompt == f"{instruction}Option: yes, no \nquestion 1\nAnswer:"
    assert task.train[1].answer == "no"
    assert (task.kind, task.labels) == ("classification", ("yes", "no"))
    assert (len(task.train), len(task.evaluation)) == (6, 4)


def test_cl_benchmark_prompts_name_group_and_data_set_where_asked_for(tmp_path: Path) -> None:
    cl_benchmark(tmp_path, "COPA", "COPA")
    task = load_one(tmp_path, "copa", format="cl_benchmark", path=".", stream={"name_tasks": True})
    assert task.train[0].prompt == "Task:COPA\nDataset:COPA\nquestion 0\nAnswer:"


def test_cl_benchmark_copa_prompt_is_only_the_sentence(tmp_path: Path) -> None:
    cl_benchmark(tmp_path, "COPA", "COPA")
    assert load_one(tmp_path, "copa", format="cl_benchmark", path=".").train[0].prompt == "question 0\nAnswer:"


@pytest.mark.parametrize("path", ["bench", "bench/TC", "bench/TC/News"])
def test_cl_benchmark_data_set_is_found_from_root_group_and_folder(tmp_path: Path, path: str) -> None:
    cl_benchmark(tmp_path / "bench", "TC", "News")
    assert len(load_one(tmp_path, "news", format="cl_benchmark", path=path).train) == 6


def test_cl_benchmark_prefers_the_exact_name_over_other_case(tmp_path: Path) -> None:
    cl_benchmark(tmp_path, "TC", "News")
    write_json(cl_benchmark(tmp_path, "SC", "news") / "train.json", records("sentence", "label", 8))
    assert len(load_one(tmp_path, "news", format="cl_benchmark", path=".").train) == 8


def test_cl_benchmark_uses_the_instruction_file_near_the_data(tmp_path: Path) -> None:
    cl_benchmark(tmp_path / "bench")
    write_json(tmp_path / "bench/instruction_config.json", {"TC": [{"instruction": "Pick.\n"}], "SC": []})
    task = load_one(tmp_path, "news", format="cl_benchmark", path="bench")
    assert task.train[0].prompt.startswith("Pick.\nOption: yes, no \n")


def test_cl_benchmark_prefers_the_recipes_instruction_file(tmp_path: Path) -> None:
    cl_benchmark(tmp_path / "bench")
    write_json(tmp_path / "bench/instruction_config.json", {"TC": [{"instruction": "Pick.\n"}]})
    write_json(tmp_path / "mine.json", {"TC": [{"instruction": "Choose.\n"}, {"instruction": "Other.\n"}]})
    stream = {"instruction_file": "mine.json", "root": "bench"}
    task = load_one(tmp_path, "news", format="cl_benchmark", stream=stream)
    assert task.train[0].prompt.startswith("Choose.\n")


def test_cl_benchmark_group_missing_in_the_file_has_its_published_text(tmp_path: Path) -> None:
    cl_benchmark(tmp_path, "SC")
    write_json(tmp_path / "instruction_config.json", {"TC": [{"instruction": "Pick.\n"}]})
    task = load_one(tmp_path, "news", format="cl_benchmark", path=".")
    assert task.train[0].prompt.startswith(PUBLISHED_INSTRUCTIONS["SC"])


def test_tasl_reads_the_task_by_its_name(tmp_path: Path) -> None:
    write_json(tmp_path / "train/sst_T5.json", records("input", "output", 6))
    write_json(tmp_path / "test/sst_T5.json", records("input", "output", 4, "t"))
    task = load_one(tmp_path, "SST", format="tasl", path=".")
    assert [e.prompt for e in task.evaluation] == ["question t0", "question t1", "question t2", "question t3"]
    assert task.labels == ("no", "yes")


def test_tasl_finds_a_numbered_task_with_and_without_the_word(tmp_path: Path) -> None:
    for name, count in {"task1572": 4, "task002": 6, "002": 8}.items():
        for split in ("train", "test"):
            write_json(tmp_path / split / f"{name}_T5.json", records("input", "output", count))
    assert len(load_one(tmp_path, "1572", format="tasl", path=".").train) == 4
    assert len(load_one(tmp_path, "002", format="tasl", path=".").train) == 8
    with pytest.raises(BadInput, match=r"no file .*2_T5.json; the folder has tasks: 002, task002, task1572"):
        load_one(tmp_path, "2", format="tasl", path=".")


@pytest.mark.parametrize("path", [".", "science"])
def test_trace_reads_prompt_and_answer(tmp_path: Path, path: str) -> None:
    write_json(tmp_path / "science/train.json", records("prompt", "answer", 6))
    write_json(tmp_path / "science/eval.json", records("prompt", "answer", 3))
    task = load_one(tmp_path, "science", {"eval_split": "dev"}, format="trace", path=path)
    assert (len(task.train), len(task.evaluation)) == (6, 3)


def test_dev_replaces_a_missing_test_file_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_json(tmp_path / "train/a_T5.json", records("input", "output", 6))
    write_json(tmp_path / "dev/a_T5.json", records("input", "output", 3))
    with caplog.at_level(logging.WARNING):
        assert len(load_one(tmp_path, "a", format="tasl", path=".").evaluation) == 3
    assert "no test file" in caplog.text
    assert "evaluating on" in caplog.text


@pytest.mark.parametrize(("wanted", "count"), [("test", 3), ("dev", 4)])
@pytest.mark.parametrize("dev", ["dev", "eval", "validation", "valid", "val"])
def test_jsonl_folder_has_five_names_for_dev(tmp_path: Path, wanted: str, count: int, dev: str) -> None:
    for name, number in (("train", 6), ("test", 3), (dev, 4)):
        write_lines(tmp_path / f"d/{name}.jsonl", as_lines(records("input", "output", number)))
    task = load_one(tmp_path, stream={"eval_split": wanted}, path="d")
    assert (len(task.evaluation), task.scored_on) == (count, wanted)


@pytest.mark.parametrize(("train", "test"), [("a", "a.test"), ("a.train", "a.test"), ("train", "test")])
def test_jsonl_file_has_its_evaluation_file_next_to_it(tmp_path: Path, train: str, test: str) -> None:
    write_lines(tmp_path / f"{train}.jsonl", as_lines(records("input", "output", 6)))
    write_lines(tmp_path / f"{test}.jsonl", as_lines(records("input", "output", 3)))
    assert len(load_one(tmp_path, path=f"{train}.jsonl").evaluation) == 3


def test_jsonl_lone_file_serves_twice(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines(records("input", "output", 6)))
    task = load_one(tmp_path, path="a.jsonl")
    assert task.train == task.evaluation
    assert task.scored_on == "train", "of which evaluation.outlook makes a notice"


def test_jsonl_takes_other_fields_blank_lines_and_line_separators(tmp_path: Path) -> None:
    lines = ['{"q": "one\u2028two", "a": " x "}', "", '{"q": "three", "a": "y"}']
    write_lines(tmp_path / "a.jsonl", lines)
    task = load_one(tmp_path, path="a.jsonl", input_field="q", output_field="a")
    assert [(e.prompt, e.answer) for e in task.train] == [("one\u2028two", "x"), ("three", "y")]


def test_byte_order_mark_is_no_part_of_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"input": "q", "output": "a"}\r\n')
    assert load_one(tmp_path, path="a.jsonl").train[0].prompt == "q"


def test_text_has_one_document_a_line(tmp_path: Path) -> None:
    write_lines(tmp_path / "c/train.txt", ["first", "", "  second  "])
    write_lines(tmp_path / "c/test.txt", ["third"])
    write_lines(tmp_path / "c/notes.txt", ["not part of it"])
    task = load_one(tmp_path, format="text", path="c")
    assert [e.answer for e in task.train] == ["first", "second"]
    assert [e.answer for e in task.evaluation] == ["third"]
    assert (task.kind, task.labels) == ("text", ())


def test_text_folder_without_train_takes_all_other_files(tmp_path: Path) -> None:
    write_lines(tmp_path / "c/b.txt", ["two"])
    write_lines(tmp_path / "c/a.txt", ["one"])
    task = load_one(tmp_path, format="text", path="c")
    assert [e.answer for e in task.train] == [e.answer for e in task.evaluation] == ["one", "two"]
    assert task.scored_on == "train"


def test_text_for_evaluation_is_not_trained_on(tmp_path: Path) -> None:
    write_lines(tmp_path / "c/a.txt", ["one"])
    write_lines(tmp_path / "c/validation.txt", ["two"])
    task = load_one(tmp_path, format="text", path="c")
    assert ([e.answer for e in task.train], [e.answer for e in task.evaluation]) == (["one"], ["two"])


def test_text_file_by_itself(tmp_path: Path) -> None:
    write_lines(tmp_path / "corpus.txt", ["one", "two"])
    write_lines(tmp_path / "corpus.dev.txt", ["three"])
    task = load_one(tmp_path, format="text", path="corpus.txt")
    assert [e.answer for e in task.evaluation] == ["three"]


def test_huggingface_saved_to_disk_has_class_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    splits = {
        split: datasets.Dataset.from_dict({"text": ["u", "v", "w"], "label": [1, 0, 1]}, features=features)
        for split in ("train", "validation")
    }
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    task = load_one(tmp_path, format="huggingface", path="saved", input_field="text", output_field="label")
    assert [e.answer for e in task.train] == ["good", "bad", "good"]
    assert task.labels == ("bad", "good")


def test_class_names_lose_the_white_space_around_them_as_answers_do(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        {"input": datasets.Value("string"), "output": datasets.ClassLabel(names=["no ", "yes"])}
    )
    split = datasets.Dataset.from_dict({"input": ["a", "b"], "output": [0, 1]}, features=features)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(str(tmp_path / "saved"))
    task = load_one(tmp_path, format="huggingface", path="saved")
    assert (task.labels, task.train[0].answer) == (("no", "yes"), "no")


def test_huggingface_folder_of_data_files(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for split in ("train", "test"):
        write_lines(tmp_path / f"files/{split}.jsonl", as_lines(records("input", "output", 6)))
    task = load_one(tmp_path, format="huggingface", path="files")
    assert (len(task.train), task.labels) == (6, ("no", "yes"))


@pytest.mark.parametrize("named", ["test", "validation", "valid", "val", "dev"])
def test_huggingface_saved_to_disk_has_many_names_for_its_splits(tmp_path: Path, named: str) -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"input": ["a", "b"], "output": ["x", "y"]})
    datasets.DatasetDict({"train": split, named: split}).save_to_disk(str(tmp_path / "saved"))
    assert load_one(tmp_path, format="huggingface", path="saved").scored_on == ("test" if named == "test" else "dev")


@pytest.mark.parametrize("empty", ["train", "test"])
def test_an_empty_split_saved_to_disk_is_named(tmp_path: Path, empty: str) -> None:
    datasets = pytest.importorskip("datasets")
    split = datasets.Dataset.from_dict({"input": ["a", "b"], "output": ["x", "y"]})
    splits = {name: split.select([]) if name == empty else split for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(BadInput, match=rf"task 'task': split '{empty}' of .*saved holds no samples$"):
        load_one(tmp_path, format="huggingface", path="saved")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["input,output"], "holds no samples: there is only a header$"),
        (["", "input,output", ""], "holds no samples: there is only a header$"),
        ([""], "is empty$"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.test.csv"])
def test_a_csv_file_without_records_is_named(tmp_path: Path, name: str, lines: list[str], message: str) -> None:
    pytest.importorskip("datasets")
    write_lines(tmp_path / "a.csv", ["input,output", "a,b"])
    write_lines(tmp_path / name, lines)
    with pytest.raises(BadInput, match=rf"{name} {message}"):
        load_one(tmp_path, format="huggingface", path="a.csv")


def write_parquet(path: Path, columns: dict[str, list[str]]) -> None:
    """A Parquet file."""
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pytest.importorskip("pyarrow").table(columns), path)


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_huggingface_single_file(tmp_path: Path, ending: str) -> None:
    def write(path: Path, count: int) -> None:
        made = records("input", "output", count)
        separator = {"csv": ",", "tsv": "\t"}.get(ending)
        if separator is not None:
            write_lines(path, [separator.join(row) for row in (("input", "output"), *(each.values() for each in made))])
        elif ending == "json":
            write_json(path, made)
        elif ending == "jsonl":
            write_lines(path, as_lines(made))
        else:
            write_parquet(path, {name: [each[name] for each in made] for name in ("input", "output")})

    write(tmp_path / f"a.{ending}", 8)
    task = load_one(tmp_path, format="huggingface", path=f"a.{ending}")
    assert task.train[1].prompt == "question 1"
    assert (len(task.train), len(task.evaluation), task.labels) == (8, 8, ("no", "yes"))
    assert task.scored_on == "train"
    write(tmp_path / f"a.test.{ending}", 5)
    streamed = load_one(tmp_path, format="huggingface", path=f"a.{ending}", streaming=True)
    assert (len(streamed.train), len(streamed.evaluation)) == (8, 5)


TEXTS = ("None", "null", "NA", "nan", "007", "1.50", "1e5", "True", "2024-01-02", "yes")
"""What pandas takes for nothing, numbers, truth values and dates."""


@pytest.mark.parametrize("path", ["folder/train.csv", "folder", "folder/train.tsv"])
@pytest.mark.parametrize("texts", [TEXTS, TEXTS[:4], TEXTS[4:7], ("1", "0"), ("True", "False")])
def test_cells_of_csv_files_are_text(tmp_path: Path, texts: tuple[str, ...], path: str) -> None:
    ending = ".tsv" if path.endswith(".tsv") else ".csv"
    rows = [("input", "output", "score"), *((text, text, "" if n else "0.5") for n, text in enumerate(texts))]
    for split in ("train", "test"):
        lines = [("\t" if ending == ".tsv" else ",").join(row) for row in rows]
        write_lines(tmp_path / f"folder/{split}{ending}", lines)
    task = load_one(tmp_path, format="huggingface", path=path, labels=())
    assert [example.prompt for example in task.train] == list(texts)
    assert [example.answer for example in task.evaluation] == list(texts)


def test_huggingface_single_file_of_another_format(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.xlsx", ["input,output"])
    with pytest.raises(BadInput, match=r"a\.xlsx has an unknown format; .* reads a folder of data files, or .*\.csv, "):
        load_one(tmp_path, format="huggingface", path="a.xlsx")


def test_huggingface_subset_of_what_has_none(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines(records("input", "output", 8)))
    with pytest.raises(BadInput, match=r"subset: 'en' names a configuration, and what is at .*a.jsonl has none"):
        load_one(tmp_path, format="huggingface", path="a.jsonl", subset="en")


def test_bytes_that_other_programs_put_into_text_files_are_read(tmp_path: Path) -> None:
    """A byte order mark, Windows' line ends, separators of Unicode inside of strings, records twice, blank lines."""
    made = [*records("input", "output", 7), {"input": "a\u2028b\u0085c", "output": "yes"}]
    lines = [line.encode() for line in ["", *as_lines([*made, made[0]]), " "]]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    task = load_one(tmp_path, path="a.jsonl")
    assert [example.prompt for example in task.train] == [*(record["input"] for record in made), made[0]["input"]]


def test_numbers_in_fields_that_are_not_read_do_no_harm(tmp_path: Path) -> None:
    odd = [
        {**each, "id": n, "score": float("nan"), "more": {"a": [1e300]}}
        for n, each in enumerate(records("input", "output", 8))
    ]
    write_lines(tmp_path / "a.jsonl", [line.replace("1e+300", "1e999") for line in as_lines(odd)])
    assert len(load_one(tmp_path, path="a.jsonl").train) == 8
