"""Where a run's inputs lie as seen from its folder, so that a project that was moved as a whole finds them again."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from cl_dist.config.schema import BUILTIN_FAMILIES, Recipe
from cl_dist.tasks.formats.format import Own, OwnSettings, paths_of, with_paths


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
        "eval.general.include_path": None if general is None else general.include_path,
        "eval.rouge_tokenizer_path": recipe.eval.rouge_tokenizer_path,
        **{f"stream.tasks[{position}].path": task.path for position, task in enumerate(stream.tasks)},
        **{f"{key}.{name}": path for key, owner in _owners(recipe) for name, path in paths_of(owner).items()},
    }
    paths = {key: Path(path) for key, path in written.items() if path is not None and os.path.isabs(path)}
    name = recipe.model.name_or_path
    return paths if name in BUILTIN_FAMILIES else {**paths, "model.name_or_path": Path(os.path.expanduser(name))}


def _owners(recipe: Recipe) -> Iterator[tuple[str, OwnSettings]]:
    """The settings that belong to formats, each with the key before their names."""
    yield from (("stream", settings) for settings in recipe.stream.shared)
    yield from ((f"stream.tasks[{position}]", task.reader) for position, task in enumerate(recipe.stream.tasks))


def _moved(settings: Own, key: str, paths: Mapping[str, str]) -> Own:
    """A format's settings with the paths that stand below `key`."""
    return with_paths(settings, {n: paths[f"{key}.{n}"] for n in paths_of(settings) if f"{key}.{n}" in paths})


def _with_paths(recipe: Recipe, paths: Mapping[str, str]) -> Recipe:
    stream, general = recipe.stream, recipe.eval.general
    tasks = tuple(
        replace(
            task,
            path=paths.get(f"stream.tasks[{position}].path", task.path),
            reader=_moved(task.reader, f"stream.tasks[{position}]", paths),
        )
        for position, task in enumerate(stream.tasks)
    )
    stream = replace(
        stream,
        tasks=tasks,
        root=paths.get("stream.root", stream.root),
        shared=tuple(_moved(settings, "stream", paths) for settings in stream.shared),
    )
    if general is not None:
        general = replace(general, include_path=paths.get("eval.general.include_path", general.include_path))
    model = replace(recipe.model, name_or_path=paths.get("model.name_or_path", recipe.model.name_or_path))
    tokenizer = paths.get("eval.rouge_tokenizer_path", recipe.eval.rouge_tokenizer_path)
    evaluation = replace(recipe.eval, general=general, rouge_tokenizer_path=tokenizer)
    return replace(recipe, stream=stream, model=model, eval=evaluation)
