"""Makes the paths in a recipe absolute, so that a run folder's config.yaml means the same as the original recipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from cl_dist.config.files import expand, is_folder, is_there
from cl_dist.config.plugins import written_out
from cl_dist.config.schema import Recipe, StreamConfig
from cl_dist.errors import BadInput
from cl_dist.methods.config import MethodConfig
from cl_dist.tasks.formats.format import Own, paths_of, with_paths


def resolve_paths(recipe: Recipe, folder: Path, typed_root: bool = False) -> Recipe:
    """Make `stream.root` absolute, and every path that is found in the recipe's folder instead of below the root.

    `~` is replaced in all paths. A recipe whose tasks give no path keeps its stream unchanged.

    Args:
        recipe: The recipe as written.
        folder: The recipe's folder.
        typed_root: Whether `stream.root` comes from the command line and therefore starts from the working directory.

    Raises:
        BadInput: A path is impossible, or no path starts from the given root.
    """
    recipe = _resolve_rouge_tokenizer(_resolve_include_path(recipe, folder), folder)
    recipe = replace(recipe, output_dir=_at_home(recipe.output_dir, "output_dir"))
    recipe = replace(recipe, method=tuple(_resolve_method(each, folder) for each in recipe.method))
    if recipe.plugins or recipe.classes:
        recipe = replace(recipe, plugins=written_out(recipe.plugins, recipe.classes))

    # Data: every path starts from the root or, if it is found only there, from the recipe's folder.
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
            path=_beside(task.path, *starts, f"stream.tasks.{number}.path", task.reader.is_at),
            reader=_resolved(task.reader, starts, f"stream.tasks.{number}"),
        )
        for number, task in enumerate(stream.tasks)
    )
    shared = tuple(_resolved(settings, starts, "stream") for settings in stream.shared)
    resolved = replace(stream, root=str(root), tasks=tasks, shared=shared)
    # The root itself is the path of tasks that give none, and of all tasks of an order.
    paths = [task.path or "" for task in tasks if task.reader.HAS_PATH] if tasks else [""]
    if all(Path(path).is_absolute() for path in (*paths, *_own_paths(resolved))):
        if stream.root is not None:
            raise BadInput(f"stream.root: {stream.root} is not read: every path of the stream is found without it")
        resolved = replace(resolved, root=None)
    return replace(recipe, stream=resolved)


def _own_paths(stream: StreamConfig) -> Iterator[str]:
    """The paths among the formats' own settings."""
    for settings in (*stream.shared, *(task.reader for task in stream.tasks)):
        yield from paths_of(settings).values()


def _resolved(settings: Own, starts: tuple[Path | None, Path], key: str) -> Own:
    """A format's settings, each path resolved by `_beside`."""
    return with_paths(settings, {n: _beside(p, *starts, f"{key}.{n}") for n, p in paths_of(settings).items()})


def _resolve_method(method: MethodConfig, folder: Path) -> MethodConfig:
    """A method's settings with absolute paths. Raises BadInput for a file that does not exist."""
    paths = {name: str(folder / expand(getattr(method, name), f"method.{name}")) for name in method.PATHS}
    for name, path in paths.items():
        with _naming(f"method.{name}"):
            if not is_there(Path(path)):
                raise BadInput(f"method.{name}: {path} does not exist")
    return replace(method, **paths) if paths else method


def _resolve_include_path(recipe: Recipe, folder: Path) -> Recipe:
    general = recipe.eval.general
    if general is None or general.include_path is None:
        return recipe
    # It starts from the recipe's folder or, if it is not there, from the working directory: it may have been typed.
    path = expand(general.include_path, "eval.general.include_path")
    with _naming("eval.general.include_path"):
        found = next((base / path for base in (folder, Path.cwd()) if is_there(base / path)), folder / path)
    return replace(recipe, eval=replace(recipe.eval, general=replace(general, include_path=str(found.absolute()))))


def _resolve_rouge_tokenizer(recipe: Recipe, folder: Path) -> Recipe:
    written = recipe.eval.rouge_tokenizer_path
    if written is None:
        return recipe
    path = expand(written, "eval.rouge_tokenizer_path")
    with _naming("eval.rouge_tokenizer_path"):
        found = next((base / path for base in (folder, Path.cwd()) if is_folder(base / path)), None)
    if found is None:  # then it is a Hugging Face id
        return recipe
    return replace(recipe, eval=replace(recipe.eval, rouge_tokenizer_path=str(found.absolute())))


def _at_home(written: str, setting: str) -> str:
    """The path with `~` replaced; any other path as written."""
    return str(expand(written, setting)) if written.startswith("~") else written


def _beside(
    written: str | None, root: Path | None, folder: Path, setting: str, is_at: Callable[[Path], bool] = is_there
) -> str | None:
    """The absolute path if it is found in the recipe's folder but not below the root; else as written, without `~`.

    Args:
        written: The path in the recipe.
        root: None if it does not exist (yet); then all paths are expected below it.
        folder: The recipe's folder.
        setting: Key of the setting, for messages.
        is_at: Whether a path leads to what it should.
    """
    if written is None:
        return None
    path = expand(written, setting)
    with _naming(setting):
        beside = root is not None and not is_at(root / path) and is_at(folder / path)
    return str(folder / path) if beside else _at_home(written, setting)


@contextmanager
def _naming(setting: str) -> Iterator[None]:
    """Start messages about a path with the setting that contains it."""
    try:
        yield
    except BadInput as error:
        raise BadInput(f"{setting}: {error}") from error
