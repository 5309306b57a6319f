"""From a recipe's name or file to a checked `Recipe`, and back to YAML."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from cl_dist.config.boundary import refusing
from cl_dist.config.files import expand, refuse_special
from cl_dist.config.overrides import apply_overrides, as_overrides, parse_override
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

    Args:
        name_or_path: The name of a shipped recipe, or a YAML file.
        overrides: Changes of the form `a.b.c=value`.
        defaults: Values by dotted key for settings that neither the recipe nor an override gives.

    Data paths in the result are absolute (see `cl_dist.config.paths`), so it means the same wherever it is stored.

    Raises:
        BadInput: The recipe is wrong; one line per problem.
    """
    with refusing("recipe"):
        return _load(name_or_path, overrides, defaults or {})


def _load(name_or_path: str, overrides: Sequence[str], defaults: Mapping[str, Any]) -> tuple[Recipe, Path]:
    changes = [parse_override(text) for text in overrides]
    name, data, folder = _find(name_or_path)
    if not isinstance(data, dict):
        raise BadInput(f"{name_or_path}: a recipe is a mapping of settings (model: ..., stream: ...), but this is not")
    with beside(folder):
        # Plugins come first: they define methods and formats that the other overrides may refer to.
        of_plugins = [change for change in changes if change.path[0] == "plugins"]
        apply_overrides(data, of_plugins)
        load_plugins(data.get("plugins"))
        apply_overrides(data, [change for change in changes if change not in of_plugins])

        for key, value in defaults.items():
            component, _, setting = key.partition(".")
            if isinstance(data.setdefault(component, {}), dict):
                data[component].setdefault(setting, value)
        typed_root = any(change.path == ("stream", "root") for change in changes)
        return check_recipe(data, name, folder, typed_root=typed_root), folder


def check_recipe(data: dict[str, Any], name: str, folder: Path, *, typed_root: bool = False) -> Recipe:
    """The recipe that settings make, with defaults and absolute data paths. Raises BadInput; changes `data`.

    Args:
        data: The settings as a recipe writes them, but `method` is a list.
        name: Name of the recipe, from which `output_dir` follows.
        folder: Where its relative paths start.
        typed_root: Whether `stream.root` comes from the command line (`resolve_paths`).
    """
    _fill_defaults(data, name)
    recipe = resolve_paths(_check(data), folder, typed_root=typed_root)
    _require_unicode(recipe)
    return recipe


def build_recipe(settings: Mapping[str, Any], name: str, folder: Path) -> Recipe:
    """The recipe that settings make which are written in Python (`Recipe.build`). Raises BadInput."""
    with refusing("recipe"), beside(folder):
        data: dict[str, Any] = {}
        load_plugins(settings.get("plugins"))
        # A method given as a mapping or a list stays whole; everything else is merged leaf by leaf.
        apply_overrides(data, [parse_override(text) for text in as_overrides(settings)])
        return check_recipe(data, name, folder.absolute())


@contextmanager
def plugins_of(name_or_path: str, overrides: Sequence[str]) -> Iterator[None]:
    """Within this context, a recipe's plugins are loaded, and classes next to the recipe are found by name.

    Ignores everything else that may be wrong with the recipe; `load_recipe` reports it. Raises `PluginError`.
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
    """The recipes that come with the package, sorted: a one-line summary by name."""
    summaries: dict[str, str] = {}
    for name, (text, order) in sorted(_shipped().items()):
        first_line = text.partition("\n")[0].strip("# .")  # a comment that says what the recipe is
        summaries[name] = first_line if order is None else f"{first_line}; order {order}"
    return summaries


@cache
def _shipped() -> dict[str, tuple[str, str | int | None]]:
    """Text and task order of the shipped recipes, by name.

    Usually a file is one recipe, named after it, and the order is None. A file whose `order` is a mapping stands for
    one recipe per entry: the key is the recipe's name, the value its order.
    """
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


def shipped_text(name: str) -> str | None:
    """A shipped recipe as a file to start from, with its comments; None if there is none of that name.

    In a file of several recipes, `order` becomes the one of this name.
    """
    if name not in _shipped():
        return None
    text, order = _shipped()[name]
    if order is None:
        return text
    entry = re.search(rf"^ +{re.escape(name)}: *(.*)$", text, re.MULTILINE)
    assert entry is not None
    return re.sub(
        r"^( +)order:.*\n(?:\1 +.*\n)+", lambda block: f"{block[1]}order: {entry[1]}\n", text, flags=re.MULTILINE
    )


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON types, with every setting in it."""
    data: dict[str, Any] = _RECIPE.dump_python(recipe, mode="json")
    return data


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, which loads to an equal `Recipe`."""
    return render_yaml(to_dict(recipe))


def _require_unicode(recipe: Recipe) -> None:
    # Names of folders are bytes. A path that is not valid UTF-8 could not be written to config.yaml.
    try:
        json.dumps(to_dict(recipe), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        word = printable(error.object[max(0, error.start - 30) : error.end])
        raise BadInput(f"recipe: the path ...{word} is not UTF-8 text; rename the folder or file") from error


def _find(name_or_path: str) -> tuple[str, Any, Path]:
    """Name, content and folder of a recipe. For a shipped recipe, the folder is the working directory."""
    if name_or_path in _shipped():
        return name_or_path, _read_shipped(name_or_path), Path.cwd()
    path = expand(name_or_path, "recipe")
    if path.suffix not in SUFFIXES:
        known = list(shipped_recipes())
        raise BadInput(
            f"{shorten(name_or_path)}: neither a shipped recipe nor a YAML file (.yaml, .yml); shipped: "
            f"{', '.join(known)}{did_you_mean(name_or_path, known)}"
        )
    return path.stem, parse_yaml(_read(path), name_or_path), path.absolute().parent


def _read(path: Path) -> str:
    refuse_special(path)
    try:
        size = path.stat().st_size
        if size > 4 * MAX_CHARACTERS:
            raise BadInput(
                f"{path}: {size} bytes is too large for a recipe; allowed: at most {MAX_CHARACTERS} characters"
            )
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise BadInput(f"{show_path(path)}: the recipe cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: the recipe is not UTF-8 text (byte {error.start})") from error


def _fill_defaults(data: dict[str, Any], name: str) -> None:
    """Fill in the defaults that depend on other settings, as far as those have the right type."""
    data.setdefault("output_dir", f"runs/{name}")
    # The answer may take half of max_length; generation may write as much as training's longest answer.
    train = data.get("train")
    if isinstance(train, dict) and isinstance(train.get("max_length"), int):
        train.setdefault("max_target_length", max(1, min(TrainConfig.max_target_length, train["max_length"] // 2)))
    longest, evaluation = train.get("max_target_length") if isinstance(train, dict) else None, data.get("eval", {})
    if isinstance(evaluation, dict) and type(longest) is int and longest > 0:
        data["eval"] = {"max_new_tokens": longest, **evaluation}


def _check(data: dict[str, Any]) -> Recipe:
    try:
        # From JSON, strict validation refuses "3" as a number but accepts a list as a tuple; from Python objects, it
        # refuses both.
        return _RECIPE.validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        names = [entry.get("name") if isinstance(entry, dict) else None for entry in data["method"]]
        raise BadInput("\n".join(describe_problems(error, names))) from error
