"""Paths of data in a recipe, made absolute once: a run folder's config.yaml then means the same as the recipe it came
from.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cl_dist.config.schema import Recipe


def resolve_paths(recipe: Recipe, folder: Path, typed_root: bool = False) -> Recipe:
    """Make `stream.root` absolute, and the paths that lie beside the recipe rather than below the root.

    folder: the recipe's. typed_root: `stream.root` was typed on the command line, so it starts from the working
    directory, as everything does that is typed there. A recipe whose tasks name no path is returned as it is.
    """
    recipe = _resolve_rouge_tokenizer(_resolve_include_path(recipe, folder), folder)
    stream = recipe.stream
    if stream.root is None and stream.instruction_file is None and not any(task.path for task in stream.tasks):
        return recipe
    root = (Path.cwd() if typed_root else folder) / Path(stream.root or "").expanduser()
    tasks = tuple(replace(task, path=_beside(task.path, root, folder)) for task in stream.tasks)
    instructions = _beside(stream.instruction_file, root, folder)
    return replace(recipe, stream=replace(stream, root=str(root), tasks=tasks, instruction_file=instructions))


def _resolve_include_path(recipe: Recipe, folder: Path) -> Recipe:
    """The folder of task files as an absolute path: in the recipe's folder, or where it is not there in the working
    directory, which it was typed in then.
    """
    general = recipe.eval.general
    if general is None or general.include_path is None:
        return recipe
    path = Path(general.include_path).expanduser()
    found = next((base / path for base in (folder, Path.cwd()) if (base / path).exists()), folder / path)
    return replace(recipe, eval=replace(recipe.eval, general=replace(general, include_path=str(found.absolute()))))


def _resolve_rouge_tokenizer(recipe: Recipe, folder: Path) -> Recipe:
    """The tokenizer's folder as an absolute path; what is no folder is a Hugging Face id."""
    written = recipe.eval.rouge_tokenizer_path
    if written is None:
        return recipe
    path = Path(written).expanduser()
    found = next((base / path for base in (folder, Path.cwd()) if (base / path).is_dir()), None)
    if found is None:
        return recipe
    return replace(recipe, eval=replace(recipe.eval, rouge_tokenizer_path=str(found.absolute())))


def _beside(written: str | None, root: Path, folder: Path) -> str | None:
    """A path that is found in the recipe's folder and not below the root as an absolute one, any other as written."""
    if written is None:
        return None
    path = Path(written).expanduser()
    if (root / path).exists() or not (folder / path).exists():
        return written
    return str(folder / path)
