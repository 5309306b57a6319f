"""From a recipe's name or file to a checked `Recipe`, and back to YAML."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cl_dist.config.boundary import refusing
from cl_dist.config.files import expand, refuse_special
from cl_dist.config.overrides import Override, apply_overrides, parse_override
from cl_dist.config.paths import resolve_paths
from cl_dist.config.plugins import beside, load_plugins
from cl_dist.config.problems import describe_problems
from cl_dist.config.schema import Recipe, TrainConfig
from cl_dist.config.words import did_you_mean, printable, shorten, show_path
from cl_dist.config.yaml_text import MAX_CHARACTERS, parse_yaml, render_yaml
from cl_dist.errors import BadInput

SUFFIXES = (".yaml", ".yml")

_RECIPE: TypeAdapter[Recipe] = TypeAdapter(Recipe)


def load_recipe(
    name_or_path: str, overrides: Sequence[str] = (), defaults: Mapping[str, Any] | None = None
) -> tuple[Recipe, Path]:
    """Read, override and check a recipe; return it with the folder that its relative paths started from.

    `name_or_path` is the name of a shipped recipe or a YAML file; overrides have the form `a.b.c=value`. Paths of data
    come out absolute (see `cl_dist.config.paths`), so the recipe means the same wherever it is written to. `defaults`
    has values by dotted key, for settings that neither the recipe nor an override gives. Raises BadInput with one line
    per problem.
    """
    with refusing("recipe"):
        return _load(name_or_path, overrides, defaults or {})


def _load(name_or_path: str, overrides: Sequence[str], defaults: Mapping[str, Any]) -> tuple[Recipe, Path]:
    changes = [parse_override(text) for text in overrides]
    name, data, folder = _find(name_or_path)
    if not isinstance(data, dict):
        raise BadInput(f"{name_or_path}: a recipe is a mapping of settings (model: ..., stream: ...), this is none")
    with beside(folder):
        # What changes may name is known once the plugins are loaded.
        listed = [change for change in changes if change.path[0] == "plugins"]
        apply_overrides(data, listed)
        load_plugins(data.get("plugins"))
        return _finish(data, name, folder, [change for change in changes if change not in listed], defaults)


def _finish(
    data: dict[str, Any], name: str, folder: Path, changes: Sequence[Override], defaults: Mapping[str, Any]
) -> tuple[Recipe, Path]:
    apply_overrides(data, changes)
    for key, value in defaults.items():
        component, _, setting = key.partition(".")
        if isinstance(data.setdefault(component, {}), dict):
            data[component].setdefault(setting, value)
    _fill_defaults(data, name)
    recipe = resolve_paths(_check(data), folder, typed_root=_types_root(changes))
    _require_unicode(recipe)
    return recipe, folder


@contextmanager
def plugins_of(name_or_path: str, overrides: Sequence[str]) -> Iterator[None]:
    """Within this context, the plugins of a recipe are loaded and classes beside it are found by their names.

    What is wrong with the recipe is left to `load_recipe`. Raises `PluginError`.
    """
    data: Any = {}
    folder = Path.cwd()
    with suppress(BadInput):
        changes = [parse_override(text) for text in overrides]
        _, data, folder = _find(name_or_path)
        apply_overrides(data, [change for change in changes if change.path[0] == "plugins"])
    with beside(folder):
        load_plugins(data.get("plugins") if isinstance(data, dict) else None)
        yield


def shipped_recipes() -> dict[str, str]:
    """The recipes that come with the package, sorted: names, and what each is.

    A file has its own name; one that differs in the task order alone has several, each with the order that it takes.
    """
    return {name: _summary(*found) for name, found in sorted(_shipped().items())}


def _summary(text: str, order: str | int | None) -> str:
    """A recipe's first line, which is a comment that says what it is."""
    return text.partition("\n")[0].strip("# .") + (f"; order {order}" if order is not None else "")


@cache
def _shipped() -> dict[str, tuple[str, str | int | None]]:
    """By name the text of a shipped recipe, and the order that replaces its table of orders; None: it has none."""
    found: dict[str, tuple[str, str | int | None]] = {}
    for file in resources.files("cl_dist.recipes").iterdir():
        if not file.name.endswith(".yaml"):
            continue
        text = file.read_text(encoding="utf-8")
        orders = parse_yaml(text, file.name)["stream"].get("order")
        names = orders if isinstance(orders, dict) else {file.name.removesuffix(".yaml"): None}
        found |= {name: (text, order) for name, order in names.items()}
    return found


def _read_shipped(name: str) -> dict[str, Any]:
    text, order = _shipped()[name]
    data: dict[str, Any] = parse_yaml(text, name)
    if order is not None:
        data["stream"]["order"] = order
    return data


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON types, every setting spelt out."""
    data: dict[str, Any] = _RECIPE.dump_python(recipe, mode="json")
    return data


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which loads to an equal `Recipe`."""
    return render_yaml(to_dict(recipe))


def _require_unicode(recipe: Recipe) -> None:
    """Folders may have names that are no text; config.yaml could not hold a path with one."""
    try:
        json.dumps(to_dict(recipe), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        word = printable(error.object[max(0, error.start - 30) : error.end])
        raise BadInput(f"recipe: the path ...{word} is not UTF-8 text; rename the folder or file") from error


def _find(name_or_path: str) -> tuple[str, Any, Path]:
    """Name, content and folder of a recipe. A shipped recipe's relative paths start from the working directory."""
    if name_or_path in _shipped():
        return name_or_path, _read_shipped(name_or_path), Path.cwd()
    path = expand(name_or_path, "recipe")
    if path.suffix not in SUFFIXES:
        known = list(shipped_recipes())
        raise BadInput(
            f"{shorten(name_or_path)}: no shipped recipe and no YAML file (.yaml, .yml); shipped: {', '.join(known)}"
            f"{did_you_mean(name_or_path, known)}"
        )
    return path.stem, parse_yaml(_read(path), name_or_path), path.absolute().parent


def _read(path: Path) -> str:
    refuse_special(path)
    try:
        size = path.stat().st_size
        if size > 4 * MAX_CHARACTERS:
            raise BadInput(f"{path}: {size} bytes are no recipe; allowed: at most {MAX_CHARACTERS} characters")
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{show_path(path)}: the recipe cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: the recipe is not UTF-8 text (byte {error.start})") from error


def _fill_defaults(data: dict[str, Any], name: str) -> None:
    """Defaults that depend on other settings."""
    data.setdefault("output_dir", f"runs/{name}")
    train = data.get("train")
    if isinstance(train, dict) and isinstance(train.get("max_length"), int):
        train.setdefault("max_target_length", max(1, min(TrainConfig.max_target_length, train["max_length"] // 2)))
    longest, evaluation = train.get("max_target_length") if isinstance(train, dict) else None, data.get("eval", {})
    if isinstance(evaluation, dict) and type(longest) is int and longest > 0:
        data["eval"] = {"max_new_tokens": longest, **evaluation}


def _types_root(changes: Sequence[Override]) -> bool:
    return any(change.path == ("stream", "root") for change in changes)


def _check(data: dict[str, Any]) -> Recipe:
    try:
        # Through JSON, because only there strict means "no text for a number" and still takes a list for a tuple.
        return _RECIPE.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in data["method"]]
        raise BadInput("\n".join(describe_problems(error, names))) from error
