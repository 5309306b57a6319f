"""Super-NaturalInstructions (arXiv 2204.07705), split into files as in the continual-learning benchmarks built on it.

`<task folder>/{train,dev,test}.json` is an object with a `Definition` and `Instances` of `{"input", "output"}`. Folders
have the names of the benchmark's tasks (`task1572_samsum_summary`); a recipe gives the name or just the number. The
prompt is the benchmark's own zero-shot prompt: definition, input, and the cue for the output.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_there
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import (
    answer_field,
    check_encodable,
    choose_evaluation,
    collect,
    enumerate_names,
    json_type,
    missing,
    read_json_object,
    require_folder,
    require_once,
    text_field,
)
from cl_dist.tasks.formats.format import EmptyAnswers, Format, RawTask, Source, Split
from cl_dist.tasks.types import Example

TASK_FOLDER = re.compile(r"task\d+_")
"""How the names of the tasks' folders begin."""


class SuperNi(Format):
    """Super-NaturalInstructions, one folder per task."""

    name = "superni"
    summary = "Super-NaturalInstructions"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """By the names of the tasks' folders."""
        files = (file for pattern in ("train.json", "*/train.json", "*/*/train.json") for file in folder.glob(pattern))
        return any(TASK_FOLDER.match(file.parent.name) for file in files)

    def read(self, source: Source) -> RawTask:
        """Read one task; `path` is its folder, or the root in which it is looked up by its name or number."""
        folder = find_task(require_folder(source.path()), source.name)
        evaluation = choose_evaluation(source.eval_split, {s: folder / f"{s}.json" for s in ("test", "dev")})
        empty = source.empty_answers
        return RawTask(read_instances(folder / "train.json", empty), read_instances(evaluation, empty))


def find_task(path: Path, name: str) -> Path:
    """`path` if it contains the task's files, or the only folder with that name or number in it or one level deeper."""
    if is_there(path / "train.json"):
        return path
    folders = [file.parent for pattern in ("*/train.json", "*/*/train.json") for file in sorted(path.glob(pattern))]
    if not folders:
        raise missing(path / "train.json")
    number = name.lower().removeprefix("task")
    found = [folder for folder in folders if folder.name == name] or [
        folder for folder in folders if f"{folder.name.lower().removeprefix('task')}_".startswith(f"{number}_")
    ]
    if len(found) != 1:
        problem = "no task" if not found else f"{len(found)} tasks"
        raise BadInput(f"{problem} {name!r} below {path}; it has: {enumerate_names(folder.name for folder in folders)}")
    return found[0]


def read_instances(path: Path, empty: EmptyAnswers) -> Split:
    """All instances of a file. Raises BadInput if it has another layout."""
    content = read_json_object(path, "with a 'Definition' and a list 'Instances'")
    if not isinstance(content.get("Instances"), list):
        raise BadInput(f"{path} must hold a JSON object with a 'Definition' and a list 'Instances'")
    convert = partial(make_instance, head=prompt_head(content, path), strict=empty == "error")
    return collect(path, enumerate(content["Instances"]), convert, "instance", empty=empty)


def prompt_head(content: Mapping[str, Any], path: Path) -> str:
    """The prompt before the input. If there are several definitions, the first one counts."""
    definition = content.get("Definition")
    text = definition[0] if isinstance(definition, list) and definition else definition
    if not isinstance(text, str) or not text.strip():
        raise BadInput(f"{path}: 'Definition' must be a string or a list of strings")
    check_encodable(text, f"{path}: 'Definition'")
    return f"Definition: {text.strip()}\n\nNow complete the following example -\nInput: "


def make_instance(instance: Any, head: str, strict: bool) -> Example:
    """One instance. Of several right outputs, the first is the answer, and all of them are references.

    Empty outputs are dropped. If `strict`, a single empty one makes the whole answer empty instead.
    """
    if not isinstance(instance, dict):
        raise BadInput(f"must be an object with 'input' and 'output', not {json_type(instance)}")
    require_once(instance, "output")
    output = instance.get("output")
    records = [{**instance, "output": each} for each in output] if isinstance(output, list) and output else [instance]
    prompt = f"{head}{text_field(instance, 'input').strip()}\nOutput:"
    found = [answer_field(record, "output") for record in records]
    answers = [answer for answer in found if answer] if all(found) or not strict else []
    return Example(prompt, answers[0] if answers else "", tuple(answers) if len(answers) > 1 else ())
