"""Which settings each data format reads. One that none of a stream's formats reads is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from cl_dist.config.words import listed, show

FILES = frozenset({"root", "eval_split"})
ANSWERS = FILES | {"empty_answers"}
INFERRED = ANSWERS | {"max_labels"}
RECORDS = INFERRED | {"input_field", "output_field", "text_field"}

READS: dict[str, frozenset[str]] = {
    "builtin": frozenset(),
    "cl_benchmark": ANSWERS | {"instruction_file", "name_tasks"},
    "tasl": INFERRED,
    "trace": INFERRED,
    "superni": INFERRED,
    "sgd": ANSWERS,
    "jsonl": RECORDS,
    "text": FILES,
    "huggingface": RECORDS | {"subset", "streaming"},
}
"""What each format reads of the settings that not all of them do, of a task and of the stream alike."""


def describe_unread(config: Any, formats: Collection[str]) -> str | None:
    """`setting: value has a meaning for ... only` for the first setting of `config` (a dataclass) that differs from its
    default and that none of the `formats` reads; None where each is read.
    """
    for field in dataclasses.fields(config):
        readers = [name for name, read in READS.items() if field.name in read]
        value = getattr(config, field.name)
        if readers and value != field.default and not set(readers) & set(formats):
            readers_named = f"format{'s' if len(readers) > 1 else ''} {listed(readers, last='and')}"
            others = listed(sorted(formats), last="and")
            return f"{field.name}: {show(value)} has a meaning for {readers_named} only, not {others}"
    return None
