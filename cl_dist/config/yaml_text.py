"""YAML as recipes use it: safe, and with the scalars of YAML 1.2.

PyYAML follows YAML 1.1, where `1e-4` is a text, `010` is eight, `no` is false and `12:30` is 750. In a recipe those are
a learning rate, a ten, an answer and a text, which is what YAML 1.2's core schema (yaml.org/spec/1.2.2, section 10.3)
says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import yaml

from cl_dist.errors import BadInput

_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+|0x[0-9a-fA-F]+|0o[0-7]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


MAX_VALUES = 100_000
"""More values than this are taken for an alias that multiplies itself."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars, unique keys, and no types but those of JSON."""

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping with text keys, each given once. Merged keys (`<<`) may be given again."""
        if not isinstance(node, yaml.MappingNode):
            raise _problem("tagged as a mapping, but it is none", node)
        seen: set[str] = set()
        for key_node, _ in node.value:
            self._check_key(key_node, seen)
        self.flatten_mapping(node)
        return {self.construct_object(key): self.construct_object(value, deep=True) for key, value in node.value}

    def _check_key(self, node: yaml.Node, seen: set[str]) -> None:
        if node.tag == "tag:yaml.org,2002:merge":
            return
        if node.tag != "tag:yaml.org,2002:str":
            shown = f"the key {node.value}" if isinstance(node, yaml.ScalarNode) else "a key"
            raise _problem(f"{shown} is not a text", node)
        if node.value in seen:
            raise _problem(f"the key {node.value} is given twice", node)
        seen.add(node.value)


# Start empty: what PyYAML's own loaders recognise and construct is not inherited.
_Loader.yaml_implicit_resolvers = {}
_Loader.yaml_constructors = {}


def _problem(text: str, node: yaml.Node) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, node.start_mark)


def _scalar(kind: str, convert: Callable[[str], Any]) -> Callable[[_Loader, yaml.ScalarNode], Any]:
    """A constructor that turns a scalar's text into a value with `convert`, and a ValueError into a problem with a
    line.
    """

    def construct(loader: _Loader, node: yaml.ScalarNode) -> Any:
        text = str(loader.construct_scalar(node))
        try:
            return convert(text)
        except ValueError:
            raise _problem(f"{text[:50]} is not usable as {kind}", node) from None

    return construct


def _to_int(text: str) -> int:
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
    raise _problem(f"the tag {node.tag} is not allowed", node)


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
    ("str", _scalar("a text", str)),
    ("bool", _scalar("true or false", _to_bool)),
    ("int", _scalar("a whole number", _to_int)),
    ("float", _scalar("a number", _to_float)),
    ("seq", _construct_sequence),
    ("map", _Loader.construct_mapping),
):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _constructor)
_Loader.add_constructor(None, _refuse_tag)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every text which a YAML 1.1 or a YAML 1.2 reader would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write equal lists out instead of pointing at the first."""
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    # Only the double-quoted style escapes Unicode's own line breaks; PyYAML folds them into spaces elsewhere.
    style = '"' if re.search("[\x85\u2028\u2029]", text) else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _represent_text)

for _first_character, _resolvers in _Loader.yaml_implicit_resolvers.items():
    for _tag, _anchored in _resolvers:
        _Dumper.add_implicit_resolver(_tag, _anchored, [_first_character])


def parse_yaml(text: str, source: str) -> Any:
    """The value that `text` holds, of JSON's types only.

    Raises BadInput, naming `source` and the line, for broken YAML, undefined or recursive anchors, doubled keys, keys
    that are no texts, and tags that would make anything but plain data.
    """
    try:
        return _unshared(yaml.load(text, Loader=_Loader), [MAX_VALUES])
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise BadInput(f"{source}{line}: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise BadInput(f"{source}: the character at position {error.position} is not allowed in YAML") from None
    except OverflowError:
        raise BadInput(f"{source}: more than {MAX_VALUES} values, counting each use of an alias") from None
    except RecursionError:
        raise BadInput(f"{source}: nested too deeply") from None


def _unshared(value: Any, left: list[int]) -> Any:
    """A copy in which no two places share a list or mapping; OverflowError once the one number in `left` is used up."""
    left[0] -= 1
    if left[0] < 0:
        raise OverflowError
    if isinstance(value, dict):
        return {key: _unshared(item, left) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item, left) for item in value]
    return value


def render_yaml(data: Mapping[str, Any]) -> str:
    """`data` as YAML that `parse_yaml` reads back equal, keys in their order."""
    return yaml.dump(dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
