"""Records whose fields the recipe names: what the formats of records have in common."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from cl_dist.tasks.formats.files import make_document, make_example
from cl_dist.tasks.formats.format import Format
from cl_dist.tasks.types import Example, Kind


class Records(Format):
    """Base of formats of records: prompt and answer, or a document, are in fields of any name."""

    name: ClassVar[str]

    input_field: str = "input"
    """Field of a record with the prompt."""
    output_field: str = "output"
    """Field of a record with the answer."""
    text_field: str | None = None
    """Field of a record with a document: the task is text, for pre-training, and `input_field` and `output_field` are
    not read."""

    def __post_init__(self) -> None:
        """Refuse a field of prompts or answers beside one of documents."""
        for name in ("input_field", "output_field"):
            value = getattr(self, name)
            if self.text_field is not None and value != getattr(Records, name):
                raise ValueError(f'{name}: "{value}" is not read where text_field names a field of documents')

    @property
    def only_documents(self) -> bool:
        """Whether a field with documents is named."""
        return self.text_field is not None

    @property
    def kind(self) -> Kind | None:
        """`text` where documents are read; else the answers will tell."""
        return "text" if self.only_documents else None

    @property
    def fields(self) -> list[str]:
        """The fields that are read."""
        return [self.input_field, self.output_field] if self.text_field is None else [self.text_field]

    @property
    def convert(self) -> Callable[[Any], Example]:
        """What turns a record into a sample."""
        if self.text_field is not None:
            return partial(make_document, field=self.text_field)
        return partial(make_example, input_field=self.input_field, output_field=self.output_field)
