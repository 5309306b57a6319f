from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.benchmarks.growth import curves, tasks, width
from cl_dist.benchmarks.growth.curves import Panel

PANEL = Panel("a title", "seconds", {"a": "label a", "b": "label b"})
SPREAD = Panel("another", "ratio", {"a": "label a"}, linear=True, spread=True)


def row(size: int, a: float) -> dict[str, float]:
    return {"size": size, "a": a, "b": 2 * a, "a, least": a / 2, "a, most": 2 * a}


def test_new_rows_replace_those_of_their_size_and_leave_the_others(tmp_path: Path) -> None:
    both = (tmp_path, tmp_path)
    curves.publish("it", [row(1, 0.12345), row(100, 3)], "size", [PANEL, SPREAD], both)
    first = (tmp_path / "it.png").read_bytes()
    curves.publish("it", [row(10, 2), row(100, 4)], "size", [PANEL, SPREAD], both)
    found = curves.read_csv(tmp_path / "it.csv")
    assert [(each["size"], each["a"]) for each in found] == [(1, 0.1235), (10, 2), (100, 4)]
    assert (tmp_path / "it.csv").read_text().splitlines()[1] == "1,0.1235,0.2469,0.06173,0.2469"
    second = (tmp_path / "it.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert second != first
    # The same rows again change nothing.
    curves.publish("it", [row(10, 2)], "size", [PANEL, SPREAD], both)
    assert (tmp_path / "it.png").read_bytes() == second


def test_a_table() -> None:
    assert curves.table([{"size": 1, "a": 0.5}]).splitlines() == ["| size | a |", "|---:|---:|", "| 1 | 0.5 |"]


@pytest.mark.parametrize("module", [tasks, width])
def test_the_committed_numbers_have_what_the_picture_shows(module: object) -> None:
    name, panels = module.NAME, module.PANELS  # type: ignore[attr-defined]
    rows = curves.read_csv(curves.RESULTS / f"{name}.csv")
    assert len(rows) >= 4
    wanted = {column for panel in panels for column in panel.lines}
    assert wanted <= set(rows[0])
    assert (curves.PICTURES / f"{name}.png").exists()
