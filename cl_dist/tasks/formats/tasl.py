"""The format of TaSL and KIF: `<root>/{train,dev,test}/<task>_T5.json`, each a list of `{"id", "input", "output"}`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import (
    choose_evaluation,
    enumerate_names,
    make_example,
    match_name,
    read_json_split,
    require_folder,
)
from cl_dist.tasks.formats.format import Format, RawTask, Source

SUFFIX = "_T5.json"


class Tasl(Format):
    """The files of TaSL and KIF."""

    name = "tasl"
    summary = "TaSL, KIF"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """By the names of its files; those of Schema-Guided Dialogue end like them."""
        return any(not path.name.endswith("-LLM_T5.json") for path in folder.glob(f"train/*{SUFFIX}"))

    def read(self, source: Source) -> RawTask:
        """Read the task with this name below the root, `path`."""
        root = require_folder(source.path())
        file_name = find_task(require_folder(root / "train"), source.name) + SUFFIX
        evaluation = choose_evaluation(source.eval_split, {s: root / s / file_name for s in ("test", "dev")})
        convert = partial(make_example, input_field="input", output_field="output")
        empty = source.empty_answers
        return RawTask(
            train=read_json_split(root / "train" / file_name, convert, empty),
            evaluation=read_json_split(evaluation, convert, empty),
        )


def find_task(folder: Path, name: str) -> str:
    """The task's name in the spelling of its file. BadInput lists the existing tasks.

    If the name is the number of a Super-NaturalInstructions task, `task<number>` is found too.
    """
    available = [path.name.removesuffix(SUFFIX) for path in folder.glob(f"*{SUFFIX}")]
    found = match_name(name, available) or (match_name(f"task{name}", available) if name.isdecimal() else [])
    if not found:
        raise BadInput(f"no file {folder / (name + SUFFIX)}; the folder has tasks: {enumerate_names(available)}")
    return found[0]
