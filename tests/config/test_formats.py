"""Settings of a stream that none of its formats reads, and its paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import StreamConfig, TaskConfig, TrainConfig
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.catalogue import builtin_formats
from cl_dist.tasks.formats.format import INFERRED, Format, StreamSettings, defaults_of
from cl_dist.tasks.stream import load_stream
from tests.tasks.data import as_lines, records, write_json, write_lines

OTHER: dict[str, Any] = {
    "input_field": "question",
    "output_field": "said",
    "text_field": "text",
    "messages_field": "talk",
    "prompt": "{question}",
    "columns": {"input": "question"},
    "eval_fraction": 0.1,
    "subset": "en",
    "streaming": True,
    "instruction_file": "mine.json",
    "name_tasks": True,
    "max_labels": 7,
    "eval_split": "dev",
    "empty_answers": "keep",
    "root": "/data",
}
"""A value of each such setting that is not its default."""
OF_RECORDS = {*("input_field", "output_field", "text_field"), *("messages_field", "prompt", "columns", "eval_fraction")}
TASK_SETTINGS = (*OF_RECORDS, "subset", "streaming")


def read_by(data_format: type[Format]) -> set[str]:
    """All settings, but those of every task and stream, that a format reads."""
    return {*data_format.USES, *defaults_of(data_format), *defaults_of(data_format.STREAM or StreamSettings)}


READS = {name: read_by(data_format) for name, data_format in builtin_formats().items()}


def test_what_each_format_reads() -> None:
    records = INFERRED | OF_RECORDS
    answers = {"root", "eval_split", "empty_answers"}
    assert {
        "builtin": set(),
        "cl_benchmark": answers | {"instruction_file", "name_tasks"},
        "tasl": INFERRED,
        "trace": INFERRED,
        "superni": INFERRED,
        "sgd": answers,
        "jsonl": records,
        "text": {"root", "eval_split", "eval_fraction"},
        "auto": records | {"subset", "streaming"},
        "huggingface": records | {"subset", "streaming"},
    } == READS
    assert set(OTHER) == {name for names in READS.values() for name in names}


@pytest.mark.parametrize("name", sorted(OTHER))
@pytest.mark.parametrize("data_format", sorted(READS))
def test_a_setting_is_refused_by_every_format_that_does_not_read_it(data_format: Any, name: str) -> None:
    def make() -> StreamConfig:
        given = {name: OTHER[name]} if name in TASK_SETTINGS else {}
        task = TaskConfig(name="spring", format=data_format, **given)
        return StreamConfig(tasks=(task,), **({} if given else {name: OTHER[name]}))

    if name in READS[data_format]:
        make()
        return
    with pytest.raises(ValidationError, match=rf"{name}: .* (is read by|is for) formats? .*not (by )?{data_format}"):
        make()


def test_one_format_of_several_that_reads_it_is_enough() -> None:
    tasks = (TaskConfig(name="spring", format="builtin"), TaskConfig(name="a", format="tasl"))
    assert StreamConfig(tasks=tasks, root="/data", eval_split="dev").eval_split == "dev"


def test_a_field_for_prompts_is_refused_with_one_for_documents() -> None:
    with pytest.raises(ValidationError, match='input_field: "q" is not read if text_field is given'):
        TaskConfig(name="a", text_field="text", input_field="q")


def test_the_format_of_an_order_is_refused_with_listed_tasks() -> None:
    with pytest.raises(ValidationError, match="format: trace is for the tasks that an order names"):
        StreamConfig(tasks=(TaskConfig(name="a", format="jsonl"),), format="trace")


RECIPE = "model: {name_or_path: 'builtin:llama-tiny'}\nstream: {tasks: [{name: a, format: jsonl, path: a.jsonl}]}\n"


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe with its data beside it."""
    write_lines(tmp_path / "a.jsonl", as_lines(records("input", "output", 8)))
    (tmp_path / "r.yaml").write_text(RECIPE)
    return str(tmp_path / "r.yaml")


def test_a_root_that_no_path_starts_from_is_refused(recipe: str, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    with pytest.raises(BadInput, match=r"stream.root: .*other is not read: every path of the stream is found without"):
        load_recipe(recipe, [f"stream.root={tmp_path / 'other'}"])
    absolute = f"stream.tasks=[{{name: a, path: {tmp_path / 'a.jsonl'}}}]"
    with pytest.raises(BadInput, match=r"stream.root: .* is not read"):
        load_recipe(recipe, [f"stream.root={tmp_path}", absolute])
    assert load_recipe(recipe, [absolute])[0].stream.root is None
    assert load_recipe(recipe)[0].stream.root == str(tmp_path)


def test_a_missing_root_is_refused(recipe: str, tmp_path: Path) -> None:
    loaded, folder = load_recipe(recipe, [f"stream.root={tmp_path / 'absent'}"])
    with pytest.raises(BadInput, match=r"stream.root: no file or folder .*absent"):
        load_stream(loaded.stream, folder, loaded.train)


def test_a_missing_instruction_file_is_refused(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_json(tmp_path / f"TC/a/{split}.json", records("sentence", "label", 8))
    write_json(tmp_path / "TC/a/labels.json", ["yes", "no"])
    task = TaskConfig(name="a", format="cl_benchmark", path="TC/a")
    with pytest.raises(BadInput, match=r"no file or folder .*absent.json"):
        load_stream(
            StreamConfig(tasks=(task,), root=str(tmp_path), instruction_file="absent.json"), tmp_path, TrainConfig()
        )


@pytest.mark.parametrize("where", ["root", "path", "instruction_file"])
def test_a_tilde_means_the_home_folder(
    where: str, recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    write_lines(home / "b.jsonl", as_lines(records("input", "output", 8)))
    for split in ("train", "test"):
        write_json(home / f"TC/a/{split}.json", records("sentence", "label", 8))
    write_json(home / "TC/a/labels.json", ["yes", "no"])
    write_json(home / "mine.json", {"TC": [{"instruction": "Mine.\n"}]})
    changes = {
        "root": ["stream.root=~/", "stream.tasks=[{name: b, path: b.jsonl}]"],
        "path": ["stream.tasks=[{name: b, path: ~/b.jsonl}]"],
        "instruction_file": [
            "stream.instruction_file=~/mine.json", "stream.tasks=[{name: a, format: cl_benchmark, path: ~/TC/a}]"
        ],
    }[where]  # fmt: skip
    loaded, folder = load_recipe(recipe, changes)
    (task,) = load_stream(loaded.stream, folder, loaded.train)
    assert len(task.train) == 8
    assert "~" not in f"{loaded.stream.root} {loaded.stream.tasks[0].path} {loaded.stream.shared}"
    assert (where == "instruction_file") == task.train[0].prompt.startswith("Mine.")


@pytest.mark.parametrize(
    "changes",
    [
        ["stream.root=~nobody-here/x"],
        ["stream.tasks=[{name: a, path: ~nobody-here/a.jsonl}]"],
        ["stream.instruction_file=~nobody-here/i.json", "stream.tasks=[{name: a, format: cl_benchmark, path: x}]"],
    ],
)
def test_an_unknown_user_is_named(changes: list[str], recipe: str) -> None:
    with pytest.raises(BadInput, match=r"^stream\..*: ~nobody-here/.*: there is no user 'nobody-here'"):
        load_recipe(recipe, changes)


def test_long_values_are_shortened_in_messages() -> None:
    with pytest.raises(BadInput) as refusal:
        load_recipe("quickstart", [f"stream.instruction_file={'a/' * 3000}", f"stream.order={'b' * 9000}"])
    assert max(map(len, str(refusal.value).splitlines())) < 800


def test_the_names_of_many_tasks_are_shortened() -> None:
    tasks = ", ".join(f"{{name: t{number}, format: builtin}}" for number in range(2000))
    with pytest.raises(
        BadInput, match=r'^method\.by_task: "none" is not a task of the stream.* \.\.\. .*t1999$'
    ) as refusal:
        load_recipe("quickstart", [f"stream.tasks=[{tasks}]", "method={name: migu, by_task: {none: {threshold: 0}}}"])
    assert len(str(refusal.value)) < 800
