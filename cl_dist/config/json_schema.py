"""The settings of a recipe as a JSON Schema (draft 7), for editors that complete, explain and check YAML.

Built from the same dataclasses as validation and help. What a schema cannot say, such as settings that exclude each
other, remains to `cl-dist run`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, get_origin

from pydantic import TypeAdapter
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from cl_dist.config.fields import component_of, info_of, settings_of
from cl_dist.config.plugins import loaded_classes, offered
from cl_dist.config.ranges import MOST_FLOAT, MOST_INT, Choices
from cl_dist.config.schema import Recipe, StreamConfig, TaskConfig
from cl_dist.methods.catalogue import GROUP, MethodEntry, known, summaries
from cl_dist.tasks.formats.catalogue import builtin_formats, format_names
from cl_dist.tasks.formats.format import Format

Schema = dict[str, Any]
OWN_CLASS = ":"
"""A pattern: the name of a user's own method or format, `module:Class`. Only the class knows its settings."""


def recipe_schema() -> Schema:
    """The schema of a recipe, with the methods and formats of the plugins that are loaded."""
    found = _object(Recipe)
    found["required"].remove("output_dir")  # it follows from the recipe's name
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "cl-dist recipe",
        **found,
    }


def _object(cls: type) -> Schema:
    """The schema of a component: a mapping with exactly its settings."""
    fields = {name: info for name, info in info_of(cls).items() if not info.exclude}
    texts = {setting.key.removesuffix("[]"): setting.help for setting in settings_of(cls)}
    properties = {name: _setting(info, texts[name]) for name, info in fields.items()}
    required = [name for name, info in fields.items() if info.is_required()]
    if cls not in (TaskConfig, StreamConfig):
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    # Settings of the formats are next to the common ones; those of the user's own classes are known only to them.
    formats: dict[str, type[Format]] = {**builtin_formats(), **loaded_classes(Format)}
    for data_format in formats.values():
        owner: type | None = data_format if cls is TaskConfig else data_format.STREAM
        for name, info in info_of(owner).items() if owner is not None else ():
            properties.setdefault(name, _setting(info, texts[name]))
    own: Schema = {"properties": {"format": {"pattern": OWN_CLASS}}, "required": ["format"]}
    if cls is StreamConfig:
        own = {"anyOf": [own, {"properties": {"tasks": {"contains": own}}, "required": ["tasks"]}]}
    closed = {"properties": dict.fromkeys(properties, True), "additionalProperties": False}
    return {"type": "object", "properties": properties, "required": required, "if": own, "then": True, "else": closed}


def _setting(info: FieldInfo, text: str) -> Schema:
    """The schema of one setting, with its help and its default."""
    found = _values(info)
    if text:
        found["description"] = text
    default = info.get_default(call_default_factory=False)
    if default is not PydanticUndefined and default is not None and _is_plain(info):
        found["default"] = to_jsonable_python(default)
    return found


def _is_plain(info: FieldInfo) -> bool:
    return (
        component_of(info.annotation) is None and get_origin(info.annotation) is not dict and not _holds_methods(info)
    )


def _values(info: FieldInfo) -> Schema:
    """The values that a setting can have."""
    if _holds_methods(info):
        method = _method()
        return {"anyOf": [method, {"type": "array", "items": method, "minItems": 1}]}
    if (component := component_of(info.annotation)) is not None:
        inner = _object(component)
        if get_origin(info.annotation) is tuple:
            return {"type": "array", "items": inner}
        return inner if info.annotation is component else {"anyOf": [inner, {"type": "null"}]}
    if any(isinstance(limit, Choices) for limit in info.metadata):
        return _names(format_names())
    annotated: Any = Annotated
    parts = (info.annotation, *info.metadata)
    kind: Any = annotated[parts] if info.metadata else info.annotation
    return _without_far_limits(TypeAdapter(kind).json_schema())


def _holds_methods(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is tuple and MethodEntry in getattr(info.annotation, "__args__", ())


def _names(known_names: list[str]) -> Schema:
    return {"type": "string", "anyOf": [{"enum": known_names}, {"pattern": OWN_CLASS}]}


def _method() -> Schema:
    """The schema of an entry of `method`, whose name decides which settings it has."""
    texts, entries = summaries(), []
    for name, cls in known().items():
        own = _object(cls)
        own["properties"]["name"] = {"const": name, "description": texts.get(name, name)}
        named = {"properties": {"name": {"const": name}}, "required": ["name"]}
        entries.append({"if": named, "then": own})
    names = {**_names(list(dict.fromkeys([*known(), *offered(GROUP)]))), "description": "Name of the method."}
    return {"type": "object", "properties": {"name": names}, "required": ["name"], "allOf": entries}


def _without_far_limits(schema: Any) -> Any:
    """The schema without limits beyond any sensible value, which only distract in an editor."""
    if isinstance(schema, list):
        return [_without_far_limits(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    return {
        key: _without_far_limits(value)
        for key, value in schema.items()
        if not (key == "maximum" and value in (MOST_INT, MOST_FLOAT))
    }


def render_schema() -> str:
    """The schema as JSON text."""
    return json.dumps(recipe_schema(), indent=2, ensure_ascii=False)
