"""Documents out of records, Hugging Face data sets read as a stream, and Super-NaturalInstructions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from cl_dist.config.schema import TaskConfig
from cl_dist.errors import BadInput
from tests.tasks.data import as_lines, load_one, records, write_json, write_lines

DOCUMENTS = [{"text": "first document", "id": 1}, {"text": "  ", "id": 2}, {"text": "second one ", "id": 3}]


def answers(task: Any) -> list[str]:
    return [example.answer for example in task.train]


def test_jsonl_documents(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", as_lines(DOCUMENTS))
    write_lines(tmp_path / "test.jsonl", as_lines(DOCUMENTS[2:]))
    task = load_one(tmp_path, format="jsonl", path=".", text_field="text")
    assert (task.kind, answers(task), len(task.evaluation)) == ("text", ["first document", "second one"], 1)
    with pytest.raises(BadInput, match=r"train.jsonl, line 1: no field 'body'"):
        load_one(tmp_path, format="jsonl", path=".", text_field="body")


@pytest.mark.parametrize("streaming", [False, True])
def test_huggingface_documents(tmp_path: Path, streaming: bool) -> None:
    write_lines(tmp_path / "corpus" / "train.txt", ["one", "", "two", "three"])
    write_lines(tmp_path / "corpus" / "test.txt", ["four"])
    task = load_one(tmp_path, format="huggingface", path="corpus", text_field="text", streaming=streaming)
    assert (task.kind, answers(task)) == ("text", ["one", "two", "three"])
    with pytest.raises(BadInput, match="body"):
        load_one(tmp_path, format="huggingface", path="corpus", text_field="body", streaming=streaming)


def test_a_stream_is_read_only_as_far_as_needed(tmp_path: Path) -> None:
    """The line behind the limit is broken: whoever reads it finds out."""
    write_lines(tmp_path / "set" / "train.jsonl", [*as_lines(records("input", "output", 6)), '{"input": "x"}'])
    write_lines(tmp_path / "set" / "test.jsonl", as_lines(records("input", "output", 6)))
    stream = {"max_train_samples": 6, "max_eval_samples": 2}
    task = load_one(tmp_path, stream=stream, format="huggingface", path="set", streaming=True)
    assert (task.kind, task.labels, len(task.train), len(task.evaluation)) == ("classification", ("no", "yes"), 6, 2)
    with pytest.raises(BadInput, match=r"record 6: field 'output' must be a string"):
        load_one(tmp_path, stream={"max_train_samples": 7}, format="huggingface", path="set", streaming=True)


def test_a_broken_stream_is_bad_input(tmp_path: Path) -> None:
    write_lines(tmp_path / "set" / "train.jsonl", [*as_lines(records("input", "output", 2)), "{broken"])
    write_lines(tmp_path / "set" / "test.jsonl", as_lines(records("input", "output", 2)))
    with pytest.raises(BadInput, match=r"data set set.* cannot be loaded"):
        load_one(tmp_path, format="huggingface", path="set", streaming=True)


def test_a_saved_data_set_is_read_in_place(tmp_path: Path) -> None:
    split = datasets.Dataset.from_list([{"text": "a b"}, {"text": "c d"}])
    datasets.DatasetDict(train=split, test=split).save_to_disk(str(tmp_path / "saved"))
    stream = {"max_train_samples": 1}
    task = load_one(tmp_path, stream=stream, format="huggingface", path="saved", text_field="text", streaming=True)
    assert answers(task) == ["a b"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"format": "jsonl", "streaming": True},
            "streaming: true is read by formats auto and huggingface only, not by jsonl",
        ),
        ({"format": "trace", "text_field": "t"}, 'text_field: "t" is read by formats auto, huggingface and jsonl'),
    ],
)
def test_settings_that_nothing_reads(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskConfig(name="t", **settings)


def superni(path: Path, *outputs: object) -> None:
    instances = [{"id": f"i{n}", "input": f"text {n} ", "output": output} for n, output in enumerate(outputs)]
    for split in ("train", "dev"):
        write_json(path / f"{split}.json", {"Definition": ["Say it shorter."], "Instances": instances})


@pytest.mark.parametrize("name", ["1572", "task1572", "task1572_samsum_summary"])
def test_superni_prompt_and_answer(tmp_path: Path, name: str) -> None:
    superni(tmp_path / "SuperNI" / "task1572_samsum_summary", ["short", "other"], "words")
    superni(tmp_path / "SuperNI" / "task157_count_letters", "no")
    task = load_one(tmp_path, name, format="superni", path=".")
    assert task.train[0].prompt == (
        "Definition: Say it shorter.\n\nNow complete the following example -\nInput: text 0\nOutput:"
    )
    assert (answers(task), task.kind, len(task.evaluation)) == (["short", "words"], "generation", 2)
    assert [example.references for example in task.evaluation] == [("short", "other"), ()]


def test_superni_names_what_is_wrong(tmp_path: Path) -> None:
    superni(tmp_path / "task002_quoref", "yes")
    with pytest.raises(BadInput, match=r"no task '2' below .* it has: task002_quoref"):
        load_one(tmp_path, "2", format="superni", path=".")
    write_json(tmp_path / "task002_quoref" / "train.json", [])
    with pytest.raises(BadInput, match=r"train.json must hold a JSON object with a 'Definition'"):
        load_one(tmp_path, "002", format="superni", path=".")
    several = {"Definition": "D", "Instances": [{"input": "i", "output": ["yes", 1]}]}
    write_json(tmp_path / "task002_quoref" / "train.json", several)
    with pytest.raises(BadInput, match=r"train.json, instance 0: field 'output' must be a string, not a number"):
        load_one(tmp_path, "002", format="superni", path=".")
    write_json(tmp_path / "task002_quoref" / "train.json", {"Definition": "D", "Instances": [{"input": "i"}]})
    with pytest.raises(BadInput, match=r"train.json, instance 0: no field 'output'"):
        load_one(tmp_path, "002", format="superni", path=".")
