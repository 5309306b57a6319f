"""Paths of data in a recipe, made absolute once: a run folder's config.yaml then means the same as the recipe it came
from.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cl_dist.config.files import expand, is_folder, is_there
from cl_dist.config.plugins import written_out
from cl_dist.config.schema import Recipe, StreamConfig
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.format import Own, paths_of, with_paths


def resolve_paths(recipe: Recipe, folder: Path, typed_root: bool = False) -> Recipe:
    """Make `stream.root` absolute, and the paths that lie beside the recipe rather than below the root; `~` is replaced
    in all of them.

    folder: the recipe's. typed_root: `stream.root` was typed on the command line, so it starts from the working
    directory, as everything does that is typed there. A recipe whose tasks name no path is returned as it is. Raises
    BadInput for a path that cannot be one, and for a root that no path starts from.
    """
    recipe = _resolve_rouge_tokenizer(_resolve_include_path(recipe, folder), folder)
    recipe = replace(recipe, output_dir=_at_home(recipe.output_dir, "output_dir"))
    if recipe.plugins or recipe.classes:
        recipe = replace(recipe, plugins=written_out(recipe.plugins, recipe.classes))
    stream = recipe.stream
    if stream.root is None and not any(_own_paths(stream)) and not any(task.path for task in stream.tasks):
        return recipe
    root = (Path.cwd() if typed_root and stream.root else folder) / expand(stream.root or "", "stream.root")
    with _naming("stream.root"):
        has_root = is_there(root)
    starts = (root if has_root else None, folder)
    tasks = tuple(
        replace(
            task,
            path=_beside(task.path, *starts, f"stream.tasks.{number}.path"),
            reader=_resolved(task.reader, starts, f"stream.tasks.{number}"),
        )
        for number, task in enumerate(stream.tasks)
    )
    shared = tuple(_resolved(settings, starts, "stream") for settings in stream.shared)
    resolved = replace(stream, root=str(root), tasks=tasks, shared=shared)
    if not _starts_from_root(resolved):
        if stream.root is not None:
            raise BadInput(f"stream.root: {stream.root} is not read: every path of the stream is found without it")
        resolved = replace(resolved, root=None)
    return replace(recipe, stream=resolved)


def _starts_from_root(stream: StreamConfig) -> bool:
    """Whether a path of the stream is looked up below its root."""
    # A task without a path, and an order's tasks, have the root itself for theirs.
    paths = [task.path or "" for task in stream.tasks if task.reader.HAS_PATH] if stream.tasks else [""]
    return any(not Path(path).is_absolute() for path in (*paths, *_own_paths(stream)))


def _own_paths(stream: StreamConfig) -> Iterator[str]:
    """The paths among the settings that belong to formats."""
    for settings in (*stream.shared, *(task.reader for task in stream.tasks)):
        yield from paths_of(settings).values()


def _resolved(settings: Own, starts: tuple[Path | None, Path], key: str) -> Own:
    """A format's settings with their paths as `_beside` has them."""
    return with_paths(settings, {n: _beside(p, *starts, f"{key}.{n}") for n, p in paths_of(settings).items()})


def _resolve_include_path(recipe: Recipe, folder: Path) -> Recipe:
    """The folder of task files as an absolute path: in the recipe's folder, or where it is not there in the working
    directory, which it was typed in then.
    """
    general = recipe.eval.general
    if general is None or general.include_path is None:
        return recipe
    path = expand(general.include_path, "eval.general.include_path")
    with _naming("eval.general.include_path"):
        found = next((base / path for base in (folder, Path.cwd()) if is_there(base / path)), folder / path)
    return replace(recipe, eval=replace(recipe.eval, general=replace(general, include_path=str(found.absolute()))))


def _resolve_rouge_tokenizer(recipe: Recipe, folder: Path) -> Recipe:
    """The tokenizer's folder as an absolute path; what is no folder is a Hugging Face id."""
    written = recipe.eval.rouge_tokenizer_path
    if written is None:
        return recipe
    path = expand(written, "eval.rouge_tokenizer_path")
    with _naming("eval.rouge_tokenizer_path"):
        found = next((base / path for base in (folder, Path.cwd()) if is_folder(base / path)), None)
    if found is None:
        return recipe
    return replace(recipe, eval=replace(recipe.eval, rouge_tokenizer_path=str(found.absolute())))


def _at_home(written: str, setting: str) -> str:
    """A path with its `~` replaced; any other as written."""
    return str(expand(written, setting)) if written.startswith("~") else written


def _beside(written: str | None, root: Path | None, folder: Path, setting: str) -> str | None:
    """A path that is found in the recipe's folder and not below the root as an absolute one, any other as written but
    for its `~`. Where there is no root as yet, none is found elsewhere in its place.
    """
    if written is None:
        return None
    path = expand(written, setting)
    with _naming(setting):
        beside = root is not None and not is_there(root / path) and is_there(folder / path)
    return str(folder / path) if beside else _at_home(written, setting)


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Let a message about a path begin with the setting that holds it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{setting}: {error}") from error
