"""Where a run's inputs lie as seen from its folder, so that a project that was moved as a whole finds them again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from cl_dist.config.schema import BUILTIN_FAMILIES, Recipe


def input_places(recipe: Recipe, run: Path) -> dict[str, str]:
    """By setting, the path of every folder and file that the recipe reads, relative to the run folder `run`."""
    start = run.resolve()
    return {key: os.path.relpath(path.resolve(), start) for key, path in _paths(recipe).items() if path.exists()}


def moved_inputs(recipe: Recipe, places: Mapping[str, str], run: Path) -> Recipe:
    """The recipe with those paths at which there is nothing any more replaced by where they were as seen from the run
    folder, if something is there. Whether it is the same is for the digests to say (`state.inputs`).
    """
    found = {}
    for key, path in _paths(recipe).items():
        moved = Path(os.path.normpath(run.resolve() / places[key])) if key in places else path
        if not path.exists() and moved.exists():
            found[key] = str(moved)
    return _with_paths(recipe, found)


def _paths(recipe: Recipe) -> dict[str, Path]:
    """The paths of a resolved recipe that stand by themselves; others start from `stream.root`."""
    stream, general = recipe.stream, recipe.eval.general
    written = {
        "stream.root": stream.root,
        "stream.instruction_file": stream.instruction_file,
        "eval.general.include_path": None if general is None else general.include_path,
        "eval.rouge_tokenizer_path": recipe.eval.rouge_tokenizer_path,
        **{f"stream.tasks[{position}].path": task.path for position, task in enumerate(stream.tasks)},
    }
    paths = {key: Path(path) for key, path in written.items() if path is not None and os.path.isabs(path)}
    name = recipe.model.name_or_path
    return paths if name in BUILTIN_FAMILIES else {**paths, "model.name_or_path": Path(os.path.expanduser(name))}


def _with_paths(recipe: Recipe, paths: Mapping[str, str]) -> Recipe:
    stream, general = recipe.stream, recipe.eval.general
    tasks = tuple(
        replace(task, path=paths.get(f"stream.tasks[{position}].path", task.path))
        for position, task in enumerate(stream.tasks)
    )
    stream = replace(
        stream,
        tasks=tasks,
        root=paths.get("stream.root", stream.root),
        instruction_file=paths.get("stream.instruction_file", stream.instruction_file),
    )
    if general is not None:
        general = replace(general, include_path=paths.get("eval.general.include_path", general.include_path))
    model = replace(recipe.model, name_or_path=paths.get("model.name_or_path", recipe.model.name_or_path))
    tokenizer = paths.get("eval.rouge_tokenizer_path", recipe.eval.rouge_tokenizer_path)
    evaluation = replace(recipe.eval, general=general, rouge_tokenizer_path=tokenizer)
    return replace(recipe, stream=stream, model=model, eval=evaluation)
