"""docs/papers.md: every command there is one that this release takes."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from cl_dist.cli.parser import build_parser
from cl_dist.config.fields import method_classes
from cl_dist.config.load import load_recipe, shipped_recipes
from cl_dist.sweep.grid import Request, build_grid
from cl_dist.tasks.orders import resolve_order

PAGE = (Path(__file__).parents[1] / "docs" / "papers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
LINES = [line for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("cl-dist ")]


def test_every_row_has_a_command_and_every_command_a_row() -> None:
    rows = re.findall(r"^\| ([A-Z]\d+) \|", PAGE, flags=re.MULTILINE)
    headed = [line.removeprefix("# ") for line in LINES if line.startswith("#")]
    assert list(dict.fromkeys(rows)) == headed
    assert len(headed) >= 20
    assert not [line for line in LINES if not line.startswith(("#", "cl-dist "))]
    assert all(after.startswith("cl-dist") for line, after in pairwise(LINES) if line[0] == "#")


@pytest.mark.parametrize("command", COMMANDS)
def test_its_recipe_loads_with_its_settings(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parsed = build_parser().parse_args(shlex.split(command)[1:])
    assert parsed.recipe in shipped_recipes()
    if parsed.command.__name__ == "run":
        assert resolve_order(*load_recipe(parsed.recipe, parsed.changes)).stream.tasks
        return
    request = Request(
        recipe=parsed.recipe,
        out=parsed.out,
        methods=parsed.methods,
        orders=parsed.orders,
        seeds=parsed.seeds,
        changes=parsed.changes,
        method_changes=parsed.method_changes,
    )
    grid = build_grid(request)
    orders, seeds = ((text or "own").split(",") for text in (parsed.orders, parsed.seeds))
    assert len(grid.cells) == len(parsed.methods.split(",")) * len(orders) * len(seeds)
    for cell in grid.cells:  # no setting got lost: what the cells of a row share is what the command says
        assert str(cell.recipe.stream.root).endswith(parsed.changes[0].partition("=")[2])
        assert {method.name for method in cell.recipe.method} <= set(method_classes())


def test_no_published_number_is_without_its_table() -> None:
    for section in PAGE.split("\n## ")[1:]:
        numbers = re.findall(r"^\| [A-Z]\d+ \|.*\| ([^|]*\d[^|]*) \|$", section, flags=re.MULTILINE)
        header = next(line for line in section.splitlines() if line.startswith("| row |"))
        assert not numbers or re.search(r"\((Table|section) [\d.]+\)", header), section
