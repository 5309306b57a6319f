"""Data formats, one module each. What a format of your own needs is importable from here (docs/extending.md)."""

from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import (
    answer_field,
    choose_evaluation,
    collect,
    evaluation_files,
    make_document,
    make_example,
    missing,
    parse_json,
    read_json_list,
    read_json_object,
    read_json_split,
    read_text,
    require_folder,
    split_files,
    text_field,
)
from cl_dist.tasks.formats.format import ANSWERS, FILES, INFERRED, Format, RawTask, Source, Split, StreamSettings
from cl_dist.tasks.formats.records import Records
from cl_dist.tasks.types import Example, Slot

__all__ = [
    "ANSWERS",
    "FILES",
    "INFERRED",
    "BadInput",
    "Example",
    "Format",
    "RawTask",
    "Records",
    "Slot",
    "Source",
    "Split",
    "StreamSettings",
    "answer_field",
    "choose_evaluation",
    "collect",
    "evaluation_files",
    "make_document",
    "make_example",
    "missing",
    "parse_json",
    "read_json_list",
    "read_json_object",
    "read_json_split",
    "read_text",
    "require_folder",
    "split_files",
    "text_field",
]
