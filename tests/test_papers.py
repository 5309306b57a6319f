"""docs/papers.md: every command there is one that this release takes."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from cl_dist.cli.parser import build_parser
from cl_dist.config.load import load_recipe, shipped_recipes
from cl_dist.config.schema import Recipe
from cl_dist.methods.catalogue import built_in
from cl_dist.methods.olora.config import OLoraConfig
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
        assert {method.name for method in cell.recipe.method} <= set(built_in())


def test_no_published_number_is_without_its_table() -> None:
    for section in PAGE.split("\n## ")[1:]:
        numbers = re.findall(r"^\| [A-Z]\d+ \|.*\| ([^|]*\d[^|]*) \|$", section, flags=re.MULTILINE)
        header = next(line for line in section.splitlines() if line.startswith("| row |"))
        assert not numbers or re.search(r"\((Table|section) [\d.]+\)", header), section


def cells_of(row: str) -> list[Recipe]:
    """The recipes of a row's commands."""
    (block,) = (block for block in BLOCKS if f"# {row}\n" in block)
    lines = block.partition(f"# {row}\n")[2].partition("# ")[0].splitlines()
    parsed = [build_parser().parse_args(shlex.split(line)[1:]) for line in lines]
    return [load_recipe(each.recipe, each.changes)[0] for each in parsed]


def test_instruction_tuning_measures_learning_by_humaneval_and_warms_up_for_a_tenth() -> None:
    (recipe,) = cells_of("M10")
    general, train = recipe.eval.general, recipe.train
    assert general is not None
    assert "humaneval" in general.tasks
    assert general.confirm_unsafe_code
    batch = train.micro_batch_size * train.gradient_accumulation * recipe.launch.processes
    assert recipe.stream.max_train_samples is not None
    assert train.warmup_steps * 10 == recipe.stream.max_train_samples * train.epochs // batch


def test_an_end_task_starts_from_what_pre_training_leaves() -> None:
    first, second = cells_of("M9")
    last = len(first.stream.tasks)
    model = Path(second.model.name_or_path)
    assert model.parts[-2:] == (f"{last:02}-{first.stream.tasks[-1].name}", "model")
    assert (second.model.objective, second.method[0].name) == ("classification", "sequential")
    assert second.train.micro_batch_size * second.train.gradient_accumulation * second.launch.processes == 16


def test_olora_has_the_values_of_its_script_for_every_task() -> None:
    """cmnfriend/O-LoRA scripts/long.sh, in its order."""
    (line,) = (line for line in COMMANDS if "--out sweeps/L1-long" in line)
    parsed = build_parser().parse_args(shlex.split(line)[1:])
    request = Request(
        recipe=parsed.recipe, changes=parsed.changes, methods=parsed.methods, orders=parsed.orders,
        seeds=parsed.seeds, out=parsed.out, method_changes=parsed.method_changes,
    )  # fmt: skip
    (cell,) = build_grid(request).cells
    (method,) = cell.recipe.method
    assert isinstance(method, OLoraConfig)
    own = [(task.name, method.for_task(task.name), task.epochs or 1) for task in cell.recipe.stream.tasks]
    assert [(name, each.lambda1, each.lambda2, epochs) for name, each, epochs in own] == [
        ("yelp", 0, 0, 1), ("amazon", 0.5, 0, 1), ("mnli", 0.5, 0, 2), ("cb", 0.5, 0, 1), ("copa", 0.5, 0.1, 1),
        ("qqp", 0.5, 0.1, 1), ("rte", 0.5, 0.3, 1), ("imdb", 0.5, 0, 1), ("sst-2", 0.5, 0.1, 1), ("dbpedia", 5, 0, 1),
        ("agnews", 5, 0, 1), ("yahoo", 5, 0.1, 1), ("multirc", 5, 0, 1), ("boolqa", 5, 0.1, 1), ("wic", 5, 0.3, 1),
    ]  # fmt: skip
