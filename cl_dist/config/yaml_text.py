"""YAML for recipes: safe, and with the scalars of YAML 1.2.

PyYAML follows YAML 1.1, where `1e-4` is a string, `010` is 8, `no` is false and `12:30` is 750. The author of a recipe
means a learning rate, 10, an answer and a string, as in the core schema of YAML 1.2 (yaml.org/spec/1.2.2, section
10.3).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import yaml

from cl_dist.config.words import printable, shorten
from cl_dist.errors import BadInput

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_SURROGATE = re.compile("[\ud800-\udfff]")

MAX_CHARACTERS = 2**20
"""Longest document, and longest sum of all strings after aliases are expanded."""
MAX_VALUES = 100_000
"""Most values after aliases are expanded. More of them suggest a "billion laughs" attack."""
MAX_DEPTH = 50
"""Deepest nesting of lists and mappings."""
MAX_SENTENCE = 200
"""Most characters of a message from PyYAML, which may quote names of any length."""
MAX_DIGITS = 100
"""Most digits of a whole number; Python itself refuses to print very long ones."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, unique keys and only the types of JSON."""

    merged = 0
    """Keys that `<<` has copied so far."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping with unique string keys; a key that `<<` merges in may be given again.

        PyYAML merges nodes, whose number explodes before anyone can count them; this merges finished mappings.
        """
        if not isinstance(node, yaml.MappingNode):
            raise _problem("tagged as a mapping, but it is not one", node)
        own: dict[Hashable, Any] = {}
        inherited: dict[Hashable, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                inherited = {**self._merged(value_node), **inherited}
            else:
                own[self._key(key_node, own)] = self.construct_object(value_node, deep=True)
        return {**inherited, **own}

    def _merged(self, node: yaml.Node) -> dict[Hashable, Any]:
        """The mapping that `<<: node` brings. If several mappings have a key, the first one counts."""
        sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
        result: dict[Hashable, Any] = {}
        for source in sources:
            mapping = self.construct_object(source, deep=True)
            if not isinstance(mapping, dict):
                raise _problem("expected a mapping or list of mappings for merging", source)
            self.merged += len(mapping)
            if self.merged > MAX_VALUES:
                raise OverflowError
            result = {**mapping, **result}
        return result

    def _key(self, node: yaml.Node, taken: Mapping[Hashable, Any]) -> str:
        if node.tag != "tag:yaml.org,2002:str":
            shown = f"the key {shorten(node.value)}" if isinstance(node, yaml.ScalarNode) else "a key"
            raise _problem(f"{shown} is not a string", node)
        key = str(self.construct_object(node))
        if key in taken:
            raise _problem(f"the key {shorten(key)} is given twice", node)
        return key


_MERGE = "tag:yaml.org,2002:merge"

# Start with empty tables instead of inheriting what PyYAML's loaders recognise and construct.
_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {}


def _problem(text: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _scalar(kind: str, convert: Callable[[str], Any]) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    """A constructor that converts a scalar's text. A ValueError of `convert` becomes a problem with a line number."""

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        try:
            return convert(text)
        except ValueError:
            raise _problem(f"{shorten(printable(text))} is not usable as {kind}", node) from None

    return construct


def _to_text(text: str) -> str:
    # File systems and terminals reject NULs and lone surrogates.
    if "\0" in text or (not text.isascii() and _SURROGATE.search(text)):
        raise ValueError
    return text


def _to_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text)


def _to_float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _to_bool(text: str) -> bool:
    if not _BOOL.fullmatch(text):
        raise ValueError(text)
    return text.lower() == "true"


def _construct_sequence(loader: _Loader, node: yaml.SequenceNode) -> list[Any]:
    return loader.construct_sequence(node, deep=True)


def _refuse_tag(loader: _Loader, node: yaml.Node) -> None:
    raise _problem(f"the tag {shorten(node.tag)} is not allowed", node)


for _tag, _pattern, _first in (
    ("null", _NULL, ["~", "n", "N", ""]),
    ("bool", _BOOL, list("tTfF")),
    ("int", _INT, list("-+0123456789")),
    ("float", _FLOAT, list("-+.0123456789")),
    ("merge", re.compile("<<"), ["<"]),
):
    _anchored = re.compile(rf"(?:{_pattern.pattern})\Z")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _anchored, _first)

for _tag, _constructor in (
    ("null", _scalar("null", lambda text: None)),
    ("str", _scalar("a string: it contains a lone surrogate or a NUL character", _to_text)),
    ("bool", _scalar("true or false", _to_bool)),
    ("int", _scalar("a whole number", _to_int)),
    ("float", _scalar("a number", _to_float)),
    ("seq", _construct_sequence),
    ("map", _Loader.construct_mapping),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)
_Loader.add_constructor(None, _refuse_tag)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string which a YAML 1.1 or YAML 1.2 reader would read as another type."""

    def ignore_aliases(self, data: Any) -> bool:
        """Always True: write shared lists out again instead of using aliases."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Only the double-quoted style escapes Unicode line breaks; in other styles, PyYAML folds them into spaces.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)

for _first_character, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _tag, _anchored in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _anchored, [_first_character])


def parse_yaml(text: str, source: str) -> Any:
    """The value of a YAML document, made of JSON types only.

    Raises BadInput, which names `source` and the line, for broken YAML, undefined or recursive anchors, duplicate keys,
    keys that are not strings, and tags for anything but plain data.
    """
    if len(text) > MAX_CHARACTERS:
        raise BadInput(f"{source}: {len(text)} characters; allowed: at most {MAX_CHARACTERS}")
    try:
        return _Copy().of(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise BadInput(f"{source}{line}: {shorten(str(error.problem or error.context), MAX_SENTENCE)}") from None
    except yaml.reader.ReaderError as error:
        raise BadInput(f"{source}: the character at position {error.position} is not allowed in YAML") from None
    except OverflowError:
        raise BadInput(
            f"{source}: more than {MAX_VALUES} values or {MAX_CHARACTERS} characters, counting each use of an alias"
        ) from None
    except RecursionError:
        raise BadInput(f"{source}: nested too deeply") from None


class _Copy:
    """Makes copies without shared lists and mappings, up to a total size."""

    def __init__(self) -> None:
        self._values, self._characters = 0, 0

    def of(self, value: Any, depth: int = 0) -> Any:
        """A deep copy. Raises OverflowError if all copies together are too large, RecursionError if it is too deep."""
        self._values += 1
        self._characters += len(value) if isinstance(value, str) else 0
        if self._values > MAX_VALUES or self._characters > MAX_CHARACTERS:
            raise OverflowError
        if depth > MAX_DEPTH:
            raise RecursionError
        if isinstance(value, dict):
            self._characters += sum(map(len, value))
            return {key: self.of(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list):
            return [self.of(item, depth + 1) for item in value]
        return value


def render_yaml(data: Mapping[str, Any]) -> str:
    """`data` as YAML. `parse_yaml` reads back an equal mapping with its keys in the same order."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
