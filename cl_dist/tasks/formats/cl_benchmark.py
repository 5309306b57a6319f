"""CL_Benchmark, which O-LoRA and MIGU use: `<root>/<GROUP>/<dataset>/{train,dev,test}.json`, next to `labels.json`.

A record is `{"sentence", "label"}`; the prompt consists of the group's instruction, the labels and the sentence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_there
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import (
    check_encodable,
    choose_evaluation,
    enumerate_names,
    json_type,
    make_example,
    match_name,
    missing,
    read_json_list,
    read_json_object,
    read_json_split,
    require_folder,
)
from cl_dist.tasks.formats.format import ANSWERS, Format, RawTask, Source, StreamSettings
from cl_dist.tasks.types import Example

INSTRUCTION_FILE = "instruction_config.json"

PUBLISHED_INSTRUCTIONS: dict[str, str] = {
    group: f"{question} Choose one from the option.\n"
    for group, question in {
        "NLI": 'What is the logical relationship between the "sentence 1" and the "sentence 2"?',
        "QQP": 'Whether the "first sentence" and the "second sentence" have the same meaning?',
        "SC": "What is the sentiment of the following paragraph?",
        "TC": "What is the topic of the following paragraph?",
        "BoolQA": "According to the following passage, is the question true or false?",
        "MultiRC": "According to the following passage and question, is the candidate answer true or false?",
        "WiC": "Given a word and two sentences, whether the word is used with the same sense in both sentence?",
    }.items()
}
"""The benchmark's instruction for each group."""

BARE_GROUPS = frozenset({"COPA"})
"""Groups whose sentences contain the question: the benchmark adds neither an instruction nor options."""


class PromptSettings(StreamSettings):
    """Settings of the prompts, for all tasks of a stream."""

    PATHS = ("instruction_file",)
    FIXED = ("name_tasks",)

    instruction_file: str | None = None
    """`instruction_config.json` from a copy of CL_Benchmark. If absent, it is searched for near the data; if there is
    none, the published texts are used."""
    name_tasks: bool = False
    """Start prompts with two lines, `Task:` with the group and `Dataset:` with the data set, as the scripts of O-LoRA
    and MIGU do (--add_task_name, --add_dataset_name). They show the model which task it is."""

    def check(self, formats: Collection[str]) -> None:
        """Refuse `name_tasks` if some of the stream's tasks have prompts in another format."""
        if self.name_tasks and set(formats) != {ClBenchmark.name}:
            others = ", ".join(sorted(formats))
            raise ValueError(f"name_tasks: true is for format {ClBenchmark.name} only, not {others}")


class ClBenchmark(Format):
    """The benchmark of O-LoRA and MIGU."""

    name = "cl_benchmark"
    summary = "O-LoRA, MIGU"
    USES = ANSWERS
    STREAM = PromptSettings

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """By the list of labels next to a training file."""
        labels = (path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}labels.json"))
        return any(is_there(path.parent / "train.json") for path in labels)

    def read(self, source: Source) -> RawTask:
        """Read one data set; `path` is its folder, or a root in which the task's name is looked up."""
        folder = find_dataset(require_folder(source.path()), source.name)
        labels = source.labels or read_labels(folder / "labels.json")
        head = prompt_head(source, folder, labels)
        if source.settings(PromptSettings).name_tasks:
            head = f"Task:{folder.parent.name}\nDataset:{folder.name}\n{head}"
        convert = partial(make_prompted, head=head)
        evaluation = choose_evaluation(source.eval_split, {s: folder / f"{s}.json" for s in ("test", "dev")})
        empty = source.empty_answers
        return RawTask(
            train=read_json_split(folder / "train.json", convert, empty, "label"),
            evaluation=read_json_split(evaluation, convert, empty, "label"),
            labels=labels,
            kind="classification",
        )


def find_dataset(path: Path, name: str) -> Path:
    """The data set's folder: `path` itself, or the folder with that name in it or in one of its groups."""
    if is_there(path / "train.json"):
        return path
    folders = [file.parent for pattern in ("*/train.json", "*/*/train.json") for file in sorted(path.glob(pattern))]
    if not folders:
        raise missing(path / "train.json")
    names = match_name(name, {folder.name for folder in folders})
    found = [folder for folder in folders if folder.name in names]
    if len(found) > 1:
        raise BadInput(
            f"{name!r} is ambiguous below {path}: {enumerate_names(map(str, found))}; give the folder as path"
        )
    if not found:
        available = enumerate_names({folder.name for folder in folders})
        raise BadInput(f"no data set {name!r} below {path}; it has: {available}")
    return found[0]


def read_labels(path: Path) -> tuple[str, ...]:
    """The strings in `labels.json`, in order. Raises BadInput if it is anything but a list of strings."""
    labels = read_json_list(path)
    for index, label in enumerate(labels):
        if not isinstance(label, str):
            raise BadInput(f"{path}, record {index}: a label must be a string, not {json_type(label)}")
        check_encodable(label, f"{path}, record {index}: the label")
    return tuple(label.strip() for label in labels)


def make_prompted(record: object, head: str) -> Example:
    """A sample whose prompt consists of head, sentence and the cue to answer."""
    example = make_example(record, "sentence", "label")
    return Example(prompt=f"{head}{example.prompt}\nAnswer:", answer=example.answer)


def prompt_head(source: Source, folder: Path, labels: tuple[str, ...]) -> str:
    """The prompt before the sentence: the group's instruction and the options, or nothing for a bare group.

    Raises BadInput for a group without a known instruction.
    """
    group = folder.parent.name
    file = instruction_file(source, folder)
    instructions = PUBLISHED_INSTRUCTIONS | (read_instructions(file) if file else {})
    if group in instructions:
        return f"{instructions[group]}Option: {', '.join(labels)} \n"
    if group in BARE_GROUPS:
        return ""
    raise BadInput(
        f"no instruction for group {group!r} of {folder}: known groups are {enumerate_names(instructions)}; "
        "name a file that has it in stream.instruction_file"
    )


def instruction_file(source: Source, folder: Path) -> Path | None:
    """The file that the recipe names, or the nearest one in the folders above the data set; None without either."""
    named = source.settings(PromptSettings).instruction_file
    if named is not None:
        return source.resolve(named)
    above = [parent / INSTRUCTION_FILE for parent in (folder, *folder.absolute().parents[:3])]
    return next((path for path in above if is_there(path)), None)


def read_instructions(path: Path) -> dict[str, str]:
    """The first instruction of each group (the benchmark's `single` strategy). Groups without one are left out."""
    content = read_json_object(path, "of groups")
    return {group: first_instruction(entries, group, path) for group, entries in content.items() if entries}


def first_instruction(entries: Any, group: str, path: Path) -> str:
    """A group's first instruction. Raises BadInput if the group is not a list of `{"instruction": text}`."""
    first = entries[0] if isinstance(entries, list) else None
    text = first.get("instruction") if isinstance(first, Mapping) else None
    if not isinstance(text, str):
        raise BadInput(f"{path}: group {group!r} must be a list of objects with a text `instruction`")
    return check_encodable(text, f"{path}: the instruction of group {group!r}")
