from __future__ import annotations

import csv
from pathlib import Path

import pytest

from cl_dist.benchmarks.harness import Times
from cl_dist.benchmarks.report import Column, flattened, table, timed, write_csv
from cl_dist.errors import BadInput

ENTRY = {"hidden": 64, "a_over_b": {"median": 0.51234, "minimum": 0.4, "maximum": 0.6}, "none": None}
DOCUMENT = {"benchmark": "step", "machine": {"cpu": "Z80"}, "settings": {"runs": 3, "lora": None}, "sizes": [ENTRY] * 2}


def test_a_table_has_one_line_for_every_size() -> None:
    columns = [Column("hidden", "hidden"), Column("a / b", "a_over_b", "ratio"), Column("some", "some", "bytes")]
    document = {**DOCUMENT, "sizes": [ENTRY, {**ENTRY, "some": 2**20}]}
    assert table(document, columns).splitlines() == [
        "step: runs 3",
        "cpu Z80",
        "",
        "| hidden | a / b           | some  |",
        "|--------|-----------------|-------|",
        "| 64     | 0.512 (0.4–0.6) | –     |",
        "| 64     | 0.512 (0.4–0.6) | 1 MiB |",
    ]


def test_a_column_without_numbers_is_omitted() -> None:
    columns = [Column("hidden", "hidden"), Column("gone", "none.b", "bytes")]
    assert table(DOCUMENT, columns).splitlines()[3:] == ["| hidden |", "|--------|", "| 64     |", "| 64     |"]


@pytest.mark.parametrize(
    ("style", "value", "text"),
    [
        ("milliseconds", {"median": 0.0123456}, "12.35"),
        ("percent", {"median": 0.876}, "88 %"),
        ("bytes", 3 * 2**20, "3 MiB"),
        ("scientific", 0.000123, "1.2e-04"),
        ("number", 0.76543, "0.765"),
        ("text", 64, "64"),
    ],
)
def test_cells(style: str, value: object, text: str) -> None:
    assert Column("title", "key", style).cell({"key": value}) == text


def test_a_missing_measurement_is_a_dash() -> None:
    assert Column("title", "seconds.dense", "milliseconds").cell({"seconds": {}}) == "–"
    assert Column("title", "peak.dense", "bytes").cell({}) == "–"


def test_the_common_part_of_all_entries() -> None:
    entry = timed(Times({"a": [1.0, 2.0], "b": [2.0, 8.0]}), [("a", "b")])
    assert entry["runs"] == 2
    assert entry["seconds"]["b"] == {"median": 5.0, "minimum": 2.0, "maximum": 8.0}
    assert entry["a_over_b"] == {"median": 0.375, "minimum": 0.25, "maximum": 0.5}


def test_nested_keys_are_joined() -> None:
    assert dict(flattened({"a": {"b": {"c": 1}, "d": 2}, "e": None})) == {"a.b.c": 1, "a.d": 2, "e": None}


def test_csv_has_a_line_for_every_size(tmp_path: Path) -> None:
    sizes = [{"hidden": 1, "x": {"median": 0.5}}, {"hidden": 2, "y": {"median": 0.25}}]
    write_csv(tmp_path / "a.csv", {**DOCUMENT, "sizes": sizes})
    with open(tmp_path / "a.csv", encoding="utf-8", newline="") as file:
        assert list(csv.DictReader(file)) == [
            {"hidden": "1", "x.median": "0.5", "y.median": "", "machine.cpu": "Z80"},
            {"hidden": "2", "x.median": "", "y.median": "0.25", "machine.cpu": "Z80"},
        ]


def test_csv_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"--csv .*: cannot be written"):
        write_csv(tmp_path, DOCUMENT)
