"""A project that was moved as a whole finds its inputs again."""

from __future__ import annotations

from pathlib import Path

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.state.places import input_places, moved_inputs
from tests.recipes import write_recipe
from tests.tasks.data import as_lines, records, write_lines


def project(folder: Path) -> Recipe:
    for split in ("train", "test"):
        write_lines(folder / "data" / f"{split}.jsonl", as_lines(records("input", "output", 4)))
    (folder / "base").mkdir()
    (folder / "run").mkdir()
    task = {"name": "one", "format": "jsonl", "path": "data"}
    path = write_recipe(folder, model={"name_or_path": str(folder / "base")}, stream={"tasks": [task]})
    return load_recipe(str(path))[0]


def test_what_moved_is_found(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    recipe = project(tmp_path / "a")
    places = input_places(recipe, tmp_path / "a" / "run")
    assert moved_inputs(recipe, places, tmp_path / "a" / "run") == recipe
    (tmp_path / "a").rename(tmp_path / "b")
    found = moved_inputs(recipe, places, tmp_path / "b" / "run")
    assert found.model.name_or_path == str(tmp_path / "b" / "base")
    assert found.stream.root == str(tmp_path / "b")
    assert found.output_dir == recipe.output_dir


def test_what_is_still_there_is_not_looked_for_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    recipe = project(tmp_path / "a")
    places = input_places(recipe, tmp_path / "a" / "run")
    (tmp_path / "a" / "run").rename(tmp_path / "run")
    assert moved_inputs(recipe, places, tmp_path / "run") == recipe


def test_what_is_nowhere_stays_as_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    recipe = project(tmp_path / "a")
    places = input_places(recipe, tmp_path / "a" / "run")
    (tmp_path / "a").rename(tmp_path / "b")
    (tmp_path / "b" / "base").rmdir()
    assert moved_inputs(recipe, places, tmp_path / "b" / "run").model == recipe.model
