from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.config.yaml_text import parse_yaml, render_yaml
from cl_dist.errors import BadInput

SCALARS = [
    ("1e-4", 1e-4),
    ("-1.5E3", -1500.0),
    (".5", 0.5),
    ("1.", 1.0),
    ("010", 10),
    ("0o17", 15),
    ("0x1F", 31),
    ("+3", 3),
    ("true", True),
    ("False", False),
    ("yes", "yes"),
    ("off", "off"),
    ("12:30", "12:30"),
    ("1_000", "1_000"),
    ("2024-01-01", "2024-01-01"),
    ("~", None),
    ("null", None),
    ("", None),
    ("''", ""),
    ("'1e-4'", "1e-4"),
]

BROKEN = [
    ("a: 1\nb: 2\na: 3", "line 3: the key a is given twice"),
    ("a: {x: 1, x: 2}", "line 1: the key x is given twice"),
    ("a: *unknown", "line 1: found undefined alias 'unknown'"),
    ("a: &a [*a]", "line 1: found unconstructable recursive node"),
    (
        "a: 1\nb: !!python/object/apply:os.system [id]",
        "line 2: the tag tag:yaml.org,2002:python/object/apply:os.system",
    ),
    ("a: !!binary aGk=", "line 1: the tag tag:yaml.org,2002:binary is not allowed"),
    ("1: 2", "line 1: the key 1 is not a string"),
    ("true: 2", "line 1: the key true is not a string"),
    ("[a]: 2", "line 1: a key is not a string"),
    ("a: [1", "line 1: expected ',' or ']'"),
    ("a: 1\n\tb: 2", "line 2: found character '\\t'"),
    ("a: 1\n---\nb: 2", "line 2: but found another document"),
    ("a: \x00", "position 3 is not allowed in YAML"),
    ("a: !!int x", "line 1: x is not usable as a whole number"),
    ("a: !!float x", "line 1: x is not usable as a number"),
    ("a: !!bool maybe", "line 1: maybe is not usable as true or false"),
    ("a: " + "9" * 5000, "is not usable as a whole number"),
    ("a: !!map 3", "line 1: tagged as a mapping, but it is not one"),
    ("[" * 600, "nested too deeply"),
]


@pytest.mark.parametrize(("text", "value"), SCALARS)
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    read = parse_yaml(f"key: {text}", "recipe.yaml")["key"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize(("text", "message"), BROKEN)
def test_broken_yaml_is_refused_with_its_line(text: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_yaml(text, "recipe.yaml")
    assert str(error.value).startswith("recipe.yaml")
    assert message in str(error.value)


def test_exploding_aliases_are_refused() -> None:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(BadInput, match="more than 100000 values"):
        parse_yaml("\n".join(lines), "recipe.yaml")


def test_merged_keys_are_counted_too() -> None:
    keys = ", ".join(f"k{number}: 1" for number in range(1000))
    with pytest.raises(BadInput, match="more than 100000 values"):  # a thousand equal ones two hundred times
        parse_yaml(f"a: &a {{{keys}}}\nb: {{<<: [{', '.join(['*a'] * 200)}]}}", "recipe.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a: &a {x: 1, y: 2}\nb: &b {y: 3, z: 4}\nc: {<<: [*a, *b], w: 5}", {"x": 1, "y": 2, "z": 4, "w": 5}),
        ("a: &a {x: 1}\nc: {x: 2, <<: *a}", {"x": 2}),
        ("a: &a {x: 1}\nb: &b {<<: *a, y: 2}\nc: {<<: *b}", {"x": 1, "y": 2}),
        ("a: &a {x: 1}\nc: {<<: *a, <<: {x: 2, y: 3}}", {"x": 1, "y": 3}),
    ],
)
def test_of_several_merged_mappings_the_first_one_counts(text: str, value: dict[str, int]) -> None:
    assert parse_yaml(text, "recipe.yaml")["c"] == value
    if text.count("<<") < 2:
        assert yaml.safe_load(text)["c"] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('a: "\\ud800"', "line 1: \\ud800 is not usable as a string"),
        ('a: "x\\0"', "line 1: x\\0 is not usable as a string"),
        ('"\\udfff": 1', "line 1: \\udfff is not usable as a string"),
        ("a: 0x" + "f" * 5000, "is not usable as a whole number"),
        ("a: {<<: 3}", "line 1: expected a mapping or list of mappings for merging"),
        ("[" * 60 + "]" * 60, "nested too deeply"),
        ("a: " + "x" * 2**20, "characters; allowed: at most 1048576"),
        ("? " + "x" * 10000 + "\n: 1\n? " + "x" * 10000 + "\n: 2", "xxx... is given twice"),
    ],
    ids=lambda text: text[:20],
)
def test_characters_that_no_file_system_or_terminal_accepts_are_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput) as error:
        parse_yaml(text, "recipe.yaml")
    assert message in str(error.value)
    assert len(str(error.value)) < 400
    str(error.value).encode("utf-8")


def test_aliases_are_copies_and_merged_keys_can_be_given_again() -> None:
    data = parse_yaml("a: &a {x: 1, y: [2]}\nb: *a\nc: {<<: *a, x: 3}", "recipe.yaml")
    assert data["c"] == {"x": 3, "y": [2]}
    data["a"]["y"].append(4)
    assert data["b"] == {"x": 1, "y": [2]}


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("\n\t\x85"))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4),
    max_leaves=10,
)


@given(st.dictionaries(TEXTS, VALUES, max_size=5))
def test_what_is_rendered_reads_back_equal(data: dict[str, Any]) -> None:
    assert parse_yaml(render_yaml(data), "rendered") == data


@pytest.mark.parametrize("text", ["yes", "1e-4", "12:30", "0o7", "2024-01-01", "null", "1_000"])
def test_both_yaml_versions_read_a_rendered_string_as_a_string(text: str) -> None:
    assert yaml.safe_load(render_yaml({"key": text})) == {"key": text} == parse_yaml(render_yaml({"key": text}), "")
