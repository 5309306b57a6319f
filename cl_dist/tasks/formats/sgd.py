"""Schema-Guided Dialogue in TaSL's format (arXiv 2408.09857): one task per service, one sample per slot of a turn.

`<root>/<folder of the split>/<service>-<split>-LLM_T5.json` is a list of `{"input", "output"}`. Next to it,
`<service>-<split>.idx` has a line per sample, `file|||dialogue|||turn|||frame|||service|||slot`, which shows what
samples belong to the same turn. The folders can have any name (TaSL: `SGD_single_service_train`), or be left out.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import (
    choose_evaluation,
    enumerate_names,
    logger,
    make_example,
    match_name,
    read_json_split,
    read_text,
    require_folder,
)
from cl_dist.tasks.formats.format import ANSWERS, Format, RawTask, Source, Split
from cl_dist.tasks.types import Slot

SUFFIX = "-LLM_T5.json"
SEPARATOR = "|||"
PARTS = 6
"""Number of parts in a line of an index."""


class Sgd(Format):
    """Dialogue state tracking, one task per service."""

    name = "sgd"
    summary = "Schema-Guided Dialogue: dialogue state tracking, TaSL"
    USES = ANSWERS
    METRIC = "jga"

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """By the names of its files."""
        return bool(split_files(folder, "train"))

    def read(self, source: Source) -> RawTask:
        """Read one service; `path` is the folder that contains the splits' folders."""
        root, name = require_folder(source.path()), source.name
        train = find_file(root, "train", name)
        if train is None:
            available = [path.name.removesuffix(f"-train{SUFFIX}") for path in split_files(root, "train")]
            raise BadInput(
                f"no file {name}-train{SUFFIX} in {root} or a folder in it; services: {enumerate_names(available)}"
            )
        files = {split: find_file(root, split, name) or expected_file(train, split) for split in ("test", "dev")}
        evaluation = choose_evaluation(source.eval_split, files)
        convert = partial(make_example, input_field="input", output_field="output")
        # Skipping an evaluation sample would drop a slot from its turn and make the turn easier.
        empty = source.empty_answers
        scored = read_json_split(evaluation, convert, "error" if empty == "error" else "keep")
        capitals = sum(example.answer != example.answer.lower() for example in scored.examples)
        if capitals:
            logger.warning("%s: %d answers have capitals, so jga will never count them as right", evaluation, capitals)
        return RawTask(
            train=read_json_split(train, convert, empty),
            evaluation=with_slots(scored, evaluation.with_name(evaluation.name.removesuffix(SUFFIX) + ".idx")),
            kind="generation",
            evaluated="test" if evaluation == files["test"] else "dev",
        )


def split_files(root: Path, split: str) -> list[Path]:
    """The files of a split, in the root and in the folders below it."""
    pattern = f"*-{split}{SUFFIX}"
    return [*sorted(root.glob(pattern)), *sorted(root.glob(f"*/{pattern}"))]


def find_file(root: Path, split: str, name: str) -> Path | None:
    """A service's file of a split, with or without `sgd_` in its name; None if it does not exist.

    Raises BadInput if two folders have one.
    """
    files = split_files(root, split)
    services = {path.name.removesuffix(f"-{split}{SUFFIX}") for path in files}
    named = match_name(name, services) or match_name(f"sgd_{name}", services)
    found = [path for path in files if named and path.name == f"{named[0]}-{split}{SUFFIX}"]
    if len(found) > 1:
        raise BadInput(f"{name!r} is ambiguous below {root}: {enumerate_names(map(str, found))}; give another path")
    return found[0] if found else None


def expected_file(train: Path, split: str) -> Path:
    """Where a split's file should be, judging by the training file; for messages."""
    folder = train.parent.with_name(train.parent.name.replace("train", split))
    return folder / train.name.replace(f"-train{SUFFIX}", f"-{split}{SUFFIX}")


def with_slots(samples: Split, index: Path) -> Split:
    """The samples with the slots that the index names. Raises BadInput if the two do not match."""
    lines = read_text(index).rstrip().split("\n")
    slots = [parse_line(line.strip(), f"{index}, line {number}") for number, line in enumerate(lines, start=1)]
    if len(slots) != len(samples.examples):
        raise BadInput(
            f"{index} has {len(slots)} lines, but {samples.origin} has {len(samples.examples)} records; every record "
            "needs a line"
        )
    examples = [replace(example, slot=slot) for example, slot in zip(samples.examples, slots, strict=True)]
    return replace(samples, examples=examples)


def parse_line(line: str, where: str) -> Slot:
    """The slot in a line of an index."""
    parts = line.split(SEPARATOR)
    if len(parts) != PARTS:
        raise BadInput(f"{where}: must be file|||dialogue|||turn|||frame|||service|||slot, not {line[:80]!r}")
    _, dialogue, turn, _, service, slot = parts
    return Slot(turn=f"{dialogue}-{turn}", name=f"{service}-{slot}")
