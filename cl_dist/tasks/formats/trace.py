"""The TRACE benchmark (arXiv 2310.06762): `<task>/{train,eval,test}.json`, each a list of `{"prompt", "answer"}`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cl_dist.config.files import is_there
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import (
    choose_evaluation,
    enumerate_names,
    make_example,
    match_name,
    missing,
    read_json_split,
    require_folder,
)
from cl_dist.tasks.formats.format import Format, RawTask, Source


class Trace(Format):
    """The TRACE benchmark."""

    name = "trace"
    summary = "TRACE"

    def read(self, source: Source) -> RawTask:
        """Read one task; `path` is its folder, or the folder of all tasks, in which its name is looked up."""
        folder = find_task(require_folder(source.path()), source.name)
        files = {"test": folder / "test.json", "dev": folder / "eval.json"}
        convert = partial(make_example, input_field="prompt", output_field="answer")
        empty = source.empty_answers
        return RawTask(
            train=read_json_split(folder / "train.json", convert, empty, "answer"),
            evaluation=read_json_split(choose_evaluation(source.eval_split, files), convert, empty, "answer"),
        )


def find_task(path: Path, name: str) -> Path:
    """`path` if it contains the task's files, else its sub-folder with that name. BadInput lists the tasks."""
    if is_there(path / "train.json"):
        return path
    available = [file.parent.name for file in path.glob("*/train.json")]
    if not available:
        raise missing(path / "train.json")
    found = match_name(name, available)
    if not found:
        raise BadInput(f"no task {name!r} in {path}; the folder has tasks: {enumerate_names(available)}")
    return path / found[0]
