"""Records with fields of any name: which of them make up a prompt and its answer, a document or a conversation."""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from cl_dist.config.words import did_you_mean, listed
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.conversations import (
    BESIDE,
    from_turns,
    has_several_answers,
    read_conversation,
    system_turns,
)
from cl_dist.tasks.formats.files import (
    Doubled,
    answer_field,
    check_encodable,
    collect,
    enumerate_names,
    json_type,
    make_document,
    make_example,
    no_field,
    require_once,
)
from cl_dist.tasks.formats.format import Format, RawTask, Source, Split
from cl_dist.tasks.formats.held_out import DrawnFraction, draw, has_evaluation
from cl_dist.tasks.formats.record_files import RecordFile, open_records
from cl_dist.tasks.types import Example, Kind, ScoredOn, Turn

ALPACA = "{instruction}\n{input}"
"""The prompt of a record with `instruction`, `input` and `output` (Stanford Alpaca's fields)."""
PAIRS = (("input", "output"), ("prompt", "completion"), ("prompt", "response"), ("prompt", "answer"))
"""Fields of prompts and answers that `format: auto` knows."""
CONVERSATIONS = ("messages", "conversations")
"""Fields of conversations that `format: auto` knows."""
HISTORY = "history"
"""Field of Alpaca's records with the turns before (LLaMA-Factory's)."""
DOCUMENT = "text"
"""Field of a document that `format: auto` knows, if there is no other."""


@dataclass(frozen=True)
class Layout:
    """How records become samples."""

    fields: tuple[str, ...]
    """What is read, by its name after renaming (`columns`)."""
    answer: str
    """The field of the answer, for messages."""
    convert: Callable[[Any], Example]
    """Makes a sample of a record after renaming. Raises BadInput for a broken one."""
    title: str
    """What it is called, for people."""
    kind: Kind | None = None
    """`text` for documents; None: the answers determine the kind."""
    optional: tuple[str, ...] = ()
    """Those of `fields` that a record may lack."""

    @property
    def required(self) -> tuple[str, ...]:
        """Those of `fields` that every record must have."""
        return tuple(field for field in self.fields if field not in self.optional)


class Records(Format):
    """Base of formats that store records whose fields can have any name."""

    name: ClassVar[str]
    DETECTS: ClassVar[bool] = False
    """Whether the fields of the first record say what it holds if no setting does."""

    input_field: str = "input"
    """Field of a record that contains the prompt."""
    output_field: str = "output"
    """Field of a record that contains the answer."""
    text_field: str | None = None
    """Field of a record that contains a document. The task is then plain text, for pre-training, and `input_field` and
    `output_field` are not read."""
    messages_field: str | None = None
    """Field of a record that contains a conversation: a list of messages with `role` and `content`, or with `from` and
    `value` as in ShareGPT. Every answer is learnt."""
    prompt: str | None = None
    """Template of the prompt, with fields of the record in braces: `"{instruction}\\n{input}"`. A field may be empty or
    null. `{{` and `}}` are braces."""
    columns: dict[str, str] | None = None
    """Other names for columns of the data, such as {input: question, output: answer}; each is the name used here and
    the column in the file."""
    eval_fraction: DrawnFraction | None = None
    """For data without an evaluation split: the fraction of the training samples that is held out for evaluation. Which
    ones depends on train.seed and on the samples, not on their order; identical samples stay on one side."""

    def __post_init__(self) -> None:
        """Refuse fields of different kinds of record together, and a template that is none."""
        kinds = [name for name in ("text_field", "messages_field", "prompt") if getattr(self, name) is not None]
        if len(kinds) > 1:
            raise ValueError(f'{kinds[1]}: "{getattr(self, kinds[1])}" is not read if {kinds[0]} is given')
        for name in ("input_field", "output_field"):
            value, used = getattr(self, name), name == "output_field" and kinds == ["prompt"]
            if kinds and not used and value != getattr(Records, name):
                raise ValueError(f'{name}: "{value}" is not read if {kinds[0]} is given')
        if self.prompt is not None:
            placeholders(self.prompt)
        renamed = self.columns or {}
        if not all(name and column for name, column in renamed.items()):
            raise ValueError("columns: a name is empty")
        doubled = next((column for column in renamed.values() if list(renamed.values()).count(column) > 1), None)
        if doubled is not None:
            names = listed((name for name, column in renamed.items() if column == doubled), last="and")
            raise ValueError(f'columns: {names} are the same column "{doubled}"; each needs its own')
        prompt = [self.input_field] if self.prompt is None else placeholders(self.prompt)
        if not {"text_field", "messages_field"} & set(kinds) and self.output_field in prompt:
            raise ValueError(
                f'{kinds[0] if kinds else "input_field"}: the prompt has the answer, "{self.output_field}"'
            )

    @property
    def only_documents(self) -> bool:
        """Whether the records contain documents."""
        return self.text_field is not None

    def layout(self, columns: Sequence[str]) -> Layout:
        """How records become samples, given the columns of the file or the fields of its first record.

        Raises BadInput for a name in `columns` that the layout does not read, and if `format: auto` cannot decide.
        """
        renamed = self.columns or {}
        known = [name for name in columns if name not in renamed.values()] + list(renamed)
        found = self._stated() or (self._detected(known) if self.DETECTS else None)
        layout = found or _pair(self.input_field, self.output_field)
        unread = [name for name in renamed if name not in layout.fields]
        if unread:
            allowed = listed(layout.fields, last="and")
            raise BadInput(
                f"columns: {unread[0]!r} is not read; the records are read as {layout.title}, from {allowed}"
                f"{did_you_mean(unread[0], layout.fields)}"
            )
        return layout

    def _stated(self) -> Layout | None:
        """The layout that the settings name; None if they leave it open."""
        if self.text_field is not None:
            return _documents(self.text_field)
        if self.messages_field is not None:
            return _conversations(self.messages_field)
        if self.prompt is not None:
            return _templated(self.prompt, self.output_field)
        if (self.input_field, self.output_field) != (Records.input_field, Records.output_field):
            return _pair(self.input_field, self.output_field)
        return None

    def _detected(self, known: Sequence[str]) -> Layout | None:
        """The layout that the names of the columns show; None if they show none."""
        found = [_conversations(name) for name in CONVERSATIONS if name in known]
        if {"instruction", "output"} <= set(known):
            found.append(_alpaca())
        else:
            found += [_pair(*pair) for pair in PAIRS if set(pair) <= set(known)]
        if len(found) > 1 and self.columns:  # what the recipe names itself counts first
            found = [layout for layout in found if set(layout.required) <= set(self.columns)] or found
        if any(layout.fields == PAIRS[0] for layout in found):  # the names that need no setting in any format
            return _pair(*PAIRS[0])
        if len(found) > 1:
            ways = listed((f"{layout.title} ({', '.join(layout.required)})" for layout in found), last="or")
            raise BadInput(
                f"the records can be read as {ways}; say which with messages_field, prompt, or input_field and "
                "output_field"
            )
        if list(known) == [DOCUMENT]:
            return _documents(DOCUMENT)
        return found[0] if found else None

    def column_of(self, field: str) -> str:
        """The column of the file that has a field."""
        return (self.columns or {}).get(field, field)

    def columns_of(self, layout: Layout) -> list[str]:
        """The columns of the file that are read."""
        return [self.column_of(field) for field in layout.fields]

    def require_columns(self, layout: Layout, origin: str, columns: Sequence[str]) -> None:
        """Raise BadInput if a file, or a data set, lacks a column."""
        for field in layout.fields:
            column = self.column_of(field)
            if column not in columns and field not in layout.optional:
                raise BadInput(
                    f"{origin} has no column {column!r}; it has: {enumerate_names(columns)}"
                    f"{did_you_mean(column, columns)}{self._hint(field, columns)}"
                )

    def _hint(self, field: str, columns: Iterable[str]) -> str:
        """What to write if the data has other names, unless the recipe names the field."""
        if field in (self.columns or {}) or self._stated() is not None or field not in ("input", "output"):
            return ""
        documents = f", and for documents text_field: {DOCUMENT}" if DOCUMENT in columns else ""
        return (
            "; if other columns hold prompt and answer, name them: columns: {input: COLUMN, output: COLUMN}" + documents
        )

    def converter(self, layout: Layout) -> Callable[[Any], Example]:
        """The function that makes a sample of a record as it is in the file."""

        def convert(record: Any) -> Example:
            if isinstance(record, dict):
                record = renamed(record, self.columns) if self.columns else record
                absent = next((f for f in layout.fields if f not in record and f not in layout.optional), None)
                if absent is not None:
                    raise no_field(record, absent, self._hint(absent, record))
            return layout.convert(record)

        return convert

    def read_files(
        self, source: Source, train: Sequence[Path], evaluation: Sequence[Path], evaluated: ScoredOn | None = None
    ) -> RawTask:
        """Read files of records.

        Args:
            source: Of the task.
            train: Files of the training split, at least one.
            evaluation: Files of the evaluation split. Without any, samples are drawn from the training data
                (`eval_fraction`), or it is scored on as a whole.
            evaluated: Which split `evaluation` is, if its name does not show it.
        """
        first = open_records(train[0])
        try:
            layout = self.layout(first.columns)
        except BadInput as error:
            raise BadInput(f"{train[0]}: {error}") from error
        opened = [first, *(open_records(path) for path in train[1:])]
        read = self._read_split(source, train, opened, layout)
        if self.eval_fraction is not None and evaluation:
            raise has_evaluation(self.eval_fraction, str(evaluation[0]))
        if not evaluation:
            return self.task(read, None, source, layout, columns=first.columns)
        scored = self._read_split(source, evaluation, [open_records(path) for path in evaluation], layout)
        return self.task(read, scored, source, layout, evaluated, columns=first.columns)

    def task(
        self,
        train: Split,
        evaluation: Split | None,
        source: Source,
        layout: Layout,
        evaluated: ScoredOn | None = None,
        labels: tuple[str, ...] | None = None,
        columns: Sequence[str] = (),
    ) -> RawTask:
        """The task of these splits; None: samples drawn from the training data, or all of it. `columns` are those of
        the data, as far as they are known.
        """
        kind = "generation" if any(map(has_several_answers, train.examples)) else layout.kind
        if evaluation is None and self.eval_fraction is not None:
            train, evaluation = draw(train, self.eval_fraction, source.seed)
            evaluated = "held-out"
        elif evaluation is None:
            evaluation, evaluated = train, "train"
        renamed_away = set((self.columns or {}).values())
        used = dict.fromkeys(
            self.column_of(field)
            for field in layout.fields
            if field not in layout.optional or (self.column_of(field) in columns and field not in renamed_away)
        )
        read_as = f"{layout.title}, from {listed(used, last='and')}"
        if unread := [name for name in columns if name and name not in used]:
            read_as = f"{read_as}; not read: {enumerate_names(unread)}"
        return RawTask(train, evaluation, labels=labels, kind=kind, evaluated=evaluated, read_as=read_as)

    def _read_split(self, source: Source, paths: Sequence[Path], files: Sequence[RecordFile], layout: Layout) -> Split:
        """The samples of all files, in order."""
        splits = []
        for path, file in zip(paths, files, strict=True):
            if file.has_header:
                self.require_columns(layout, str(path), file.columns)
            rows, convert = file.rows(self.columns_of(layout)), self.converter(layout)
            empty = source.empty_answers
            splits.append(collect(path, rows, convert, file.unit, empty=empty, answer_name=layout.answer))
        if len(splits) == 1:
            return splits[0]
        examples = [example for split in splits for example in split.examples]
        return Split(examples, f"{paths[0].parent} ({len(paths)} files)", range(len(examples)), "record")


def _documents(field: str) -> Layout:
    return Layout((field,), field, partial(make_document, field=field), "documents", kind="text")


def _pair(input_field: str, output_field: str) -> Layout:
    convert = partial(make_example, input_field=input_field, output_field=output_field)
    return Layout((input_field, output_field), output_field, convert, "prompts and answers")


def _conversations(field: str) -> Layout:
    def convert(record: Any) -> Example:
        if not isinstance(record, dict):
            raise BadInput(f"must be an object with {field!r}, not {json_type(record)}")
        require_once(record, field)
        return read_conversation(record, field)

    return Layout((field, *BESIDE), field, convert, "conversations", optional=BESIDE)


def _alpaca() -> Layout:
    """Alpaca's records; some have a system prompt too, which makes conversations of them."""
    plain = _templated(ALPACA, "output")

    def convert(record: Any) -> Example:
        example = plain.convert(record)
        if record.get(HISTORY):
            raise BadInput(f"field {HISTORY!r} is not allowed; write such records as conversations (messages)")
        system = system_turns(record)
        return from_turns([*system, Turn("user", example.prompt), Turn("assistant", example.answer)])

    extra = (*BESIDE, HISTORY)
    return Layout((*plain.fields, *extra), "output", convert, "Alpaca's records", optional=("input", *extra))


def _templated(template: str, output_field: str) -> Layout:
    names = placeholders(template)
    parts = list(string.Formatter().parse(template))

    def convert(record: Any) -> Example:
        if not isinstance(record, dict):
            raise BadInput(f"must be an object with {listed(map(repr, names), last='and')}, not {json_type(record)}")
        values = {name: _fill_in(record, name) for name in names}
        prompt = "".join(text + ("" if name is None else values[name]) for text, name, *_ in parts)
        if not any(value.strip() for value in values.values()):
            raise BadInput(f"{listed(map(repr, names), last='and')}: nothing to fill into the prompt")
        # What stood between an empty field and the next one is not left hanging at an end of the prompt.
        return Example(prompt if all(values.values()) else prompt.strip(), answer_field(record, output_field))

    return Layout((*names, output_field), output_field, convert, "a prompt template")


def _fill_in(record: Mapping[str, Any], name: str) -> str:
    """A field's text; empty for null, and for a field that may be missing."""
    require_once(record, name)
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise BadInput(f"field {name!r} must be a string, not {json_type(value)}")
    return "" if value is None else check_encodable(value, f"field {name!r}")


def placeholders(template: str) -> tuple[str, ...]:
    """The fields in a prompt template, in order. Raises ValueError, which starts with `prompt:`, if it has none."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f'prompt: "{template}" has a brace without its partner (a plain brace is {{{{ or }}}})'
        ) from error
    found = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    if not found or any(not name or spec or conversion for name, spec, conversion in found):
        raise ValueError(f'prompt: "{template}" must name fields in braces, as in {{instruction}}')
    return tuple(dict.fromkeys(name for name, _, _ in found))


def renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The record with its columns under the names that the recipe gives them. Raises BadInput if one is missing."""
    for name, column in columns.items():
        if column not in record:
            raise BadInput(f"columns: {name}: {no_field(record, column)}")
        require_once(record, column)
    others = {key: value for key, value in record.items() if key not in columns.values()}
    found: dict[str, Any] = {**others, **{name: record[column] for name, column in columns.items()}}
    if isinstance(record, Doubled):
        kept = Doubled(found)
        kept.keys_twice = record.keys_twice - set(columns)
        return kept
    return found
