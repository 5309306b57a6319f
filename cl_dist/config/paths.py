"""Paths of data in a recipe, made absolute once: a run folder's config.yaml then means the same as the recipe it came
from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cl_dist.config.boundary import refusing
from cl_dist.config.schema import Recipe
from cl_dist.config.words import shorten, show_path
from cl_dist.errors import BadInput


def expand(written: str, key: str) -> Path:
    """A path as typed, with `~` and `~user` as home folders; BadInput, which names the setting, for an unknown user."""
    try:
        return Path(written).expanduser()
    except RuntimeError as error:
        user = shorten(written.partition("/")[0])
        raise BadInput(
            f"{key}: {shorten(written)}: {user} is no home folder, since there is no such user; give a whole path, or "
            f"./{user} for a folder of that name"
        ) from error


def resolve_paths(recipe: Recipe, folder: Path, typed_root: bool = False) -> Recipe:
    """Make `stream.root` absolute, and the paths that lie beside the recipe rather than below the root; put homes
    in the place of `~`.

    folder: the recipe's. typed_root: `stream.root` was typed on the command line, so it starts from the working
    directory, as everything does that is typed there. A recipe whose tasks name no path is returned as it is.
    """
    recipe = _resolve_include_path(recipe, folder)
    recipe = replace(recipe, output_dir=_at_home(recipe.output_dir, "output_dir"))
    stream = recipe.stream
    if stream.root is None and stream.instruction_file is None and not any(task.path for task in stream.tasks):
        return recipe
    root = (Path.cwd() if typed_root else folder) / expand(stream.root or "", "stream.root")
    tasks = tuple(
        replace(task, path=_beside(task.path, f"stream.tasks.{number}.path", root, folder))
        for number, task in enumerate(stream.tasks)
    )
    instructions = _beside(stream.instruction_file, "stream.instruction_file", root, folder)
    with refusing("stream.root"):
        _refuse_endless(root, "stream.root")
    return replace(recipe, stream=replace(stream, root=str(root), tasks=tasks, instruction_file=instructions))


def _resolve_include_path(recipe: Recipe, folder: Path) -> Recipe:
    """The folder of task files as an absolute path: in the recipe's folder, or where it is not there in the working
    directory, which it was typed in then.
    """
    general = recipe.eval.general
    if general is None or general.include_path is None:
        return recipe
    path = expand(general.include_path, "eval.general.include_path")
    with refusing("eval.general.include_path"):
        found = next((base / path for base in (folder, Path.cwd()) if (base / path).exists()), folder / path)
    return replace(recipe, eval=replace(recipe.eval, general=replace(general, include_path=str(found.absolute()))))


def _at_home(written: str, key: str) -> str:
    """A path with its `~` expanded; any other as written."""
    return str(expand(written, key)) if written.startswith("~") else written


def _beside(written: str | None, key: str, root: Path, folder: Path) -> str | None:
    """A path that starts at home, or is found in the recipe's folder and not below the root, as an absolute one; any
    other as written.
    """
    if written is None:
        return None
    written = _at_home(written, key)
    with refusing(key):
        below, beside = root / written, folder / written
        found = below if below.exists() or not beside.exists() else beside
        _refuse_endless(found, key)
    return written if found is below else str(found)


def _refuse_endless(path: Path, key: str) -> None:
    """Who reads a pipe or a device may wait for ever, or never come to its end."""
    if path.exists() and not path.is_file() and not path.is_dir():
        raise BadInput(f"{key}: {show_path(path)} is a pipe, a socket or a device; allowed: a file or a folder")
