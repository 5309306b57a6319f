"""Imports the code that a recipe names: the user's own methods and data formats.

`module:Class` names a class. Its module is installed, is next to the recipe, or is listed in the recipe's `plugins`, by
name or as the path of a `.py` file. Installed packages may also offer classes under plain names, as entry points.
Nothing is imported unless it is named, and the recipe's folder comes last on `sys.path`, so a file that happens to be
there never shadows an installed module. This module imports no framework; a plugin may.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from cl_dist.config.files import expand, is_file
from cl_dist.config.words import did_you_mean, shorten, show
from cl_dist.errors import BadInput

Class = TypeVar("Class", bound=type)

_ALLOWED = "allowed: the name of a module that is installed or next to the recipe, or the path of a .py file"
_recipe_folder: ContextVar[Path | None] = ContextVar("recipe_folder", default=None)
_loaded: dict[str, ModuleType] = {}
"""Every module that a recipe has named in this process."""
_own_packages: set[str] = set()
"""Top-level names of the modules and packages that the user's own methods and formats come from."""


class PluginError(BadInput):
    """A plugin is missing, raises an error on import, or is not a class of the expected kind."""


@contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Within this context, modules are also searched for in a recipe's `folder`."""
    token = _recipe_folder.set(folder)
    try:
        yield
    finally:
        _recipe_folder.reset(token)


def names_class(name: object) -> bool:
    """Whether the name of a method or a format has the form `module:Class`."""
    return isinstance(name, str) and ":" in name


def load_plugins(entries: object, *, known: bool = False) -> None:
    """Import the modules that a recipe lists in `plugins`; leave entries that are not strings to validation.

    known: skip modules that are loaded already, even if the entry gives another path. A stored recipe does so if the
    project has been moved or copied. Raises `PluginError`.
    """
    for entry in entries if isinstance(entries, list | tuple) else ():
        if isinstance(entry, str) and not (known and _known_name(entry) in _loaded):
            _load(entry, "plugins")


def load_class(name: str, base: Class, kind: str, setting: str) -> Class:
    """The class that `module:Class` names.

    Args:
        name: The name in the recipe.
        base: The class that it must derive from.
        kind: "method" or "format", for messages.
        setting: The setting that contains the name, for messages.

    Raises:
        PluginError: The module or class does not exist, or the class does not derive from `base`.
    """
    written, _, attribute = name.partition(":")
    module = _load(written, setting)
    place = f"{setting}: {shorten(name)}"
    found = getattr(module, attribute, None) if attribute.isidentifier() else None
    if found is None:
        own = _classes_of(module, base)
        has = f"; its {kind}s are {', '.join(own)}{did_you_mean(attribute, own)}" if own else f"; it has no {kind}"
        raise PluginError(f"{place}: {_where(module)} has no class {show(attribute)}{has}")
    return _checked(found, base, kind, place)


def loaded_classes(base: Class) -> dict[str, Class]:
    """Classes derived from `base` in all modules that recipes have named in this process, as `module:Class`."""
    return {f"{name}:{key}": cls for name, module in _loaded.items() for key, cls in _classes_of(module, base).items()}


@cache
def offered(group: str) -> Mapping[str, EntryPoint]:
    """The entry points of a group in all installed packages, by name. Imports none of them."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load_offered(entry: EntryPoint, base: Class, kind: str, setting: str, built_in: Iterable[str]) -> Class:
    """The class behind an entry point. Refuses one with a `built_in` name; all else is as in `load_class`."""
    package = f" of package {entry.dist.name}" if entry.dist is not None else ""
    place = f"{setting}: {entry.name} (entry point {entry.value}{package})"
    if entry.name in built_in:
        raise PluginError(f"{place}: a built-in {kind} has this name; its package must offer it under another one")
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{place}: loading it raised {_one_line(error)}") from error
    _own_packages.add(entry.module.partition(".")[0])
    return _checked(found, base, kind, place)


def own_fault(error: BaseException) -> str | None:
    """Describe an exception that the user's own code raised or passed on, with the innermost line of that code.

    Returns None if no line of the user's code is in the traceback.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in _own_packages and package != "cl_dist":
            code = frame.f_code
            return f"{code.co_filename}, line {line}, in {code.co_name}: your own code raised {_one_line(error)}"
    return None


def written_out(entries: Iterable[str], classes: Iterable[str]) -> tuple[str, ...]:
    """The `plugins` of a recipe, rewritten so that they can be found from any folder.

    Modules next to the recipe get their absolute path; those that only `classes` (of the form `module:Class`) refer to
    are added. Call it in the same `beside` in which the entries and classes were loaded.
    """
    found = [_absolute(entry) or entry for entry in entries]
    names = (name.partition(":")[0] for name in classes)
    found += [path for name in names if (path := _absolute(name)) is not None]
    return tuple(dict.fromkeys(found))


def source_files(modules: Iterable[str]) -> list[tuple[str, Path]]:
    """Name and path of the loaded modules' Python files, sorted. A module in a package stands for the whole package."""
    files: dict[str, Path] = {}
    for name in modules:
        top = sys.modules[name.partition(".")[0]]
        for path in _python_files(top):
            root = path.parent if not hasattr(top, "__path__") else Path(next(iter(top.__path__))).parent
            files[path.relative_to(root).as_posix()] = path
    return sorted(files.items())


def module_names(entries: Iterable[str], classes: Iterable[str]) -> list[str]:
    """Names of the loaded modules that a recipe's `plugins` and its `classes` (`module:Class`) refer to."""
    names = [*map(_known_name, entries), *(name.partition(":")[0] for name in classes)]
    return [name for name in dict.fromkeys(names) if name in _loaded]


def _load(entry: str, setting: str) -> ModuleType:
    """Import the module that an entry of `plugins`, or the first half of `module:Class`, names."""
    # Translate the entry into a module name, and the folder in which the module may be.
    folder = _recipe_folder.get()
    if _is_path(entry):
        path = (folder or Path.cwd()) / expand(entry, setting)
        if not is_file(path):
            raise PluginError(f"{setting}: {shorten(entry, 300)}: this file does not exist; {_ALLOWED}")
        folder, name = _root_and_name(path, setting)
    else:
        path, name = None, entry
    if not all(part.isidentifier() for part in name.split(".")):
        what = f"{show(name)} is not the name of a module"
        raise PluginError(f"{setting}: {what if path is None else f'{path}: {what}; rename the file'}; {_ALLOWED}")

    module = _import(name, folder, setting)
    if not isinstance(module, ModuleType):
        raise PluginError(f"{setting}: {name}: importing it left another object in sys.modules")

    # The folder comes last on sys.path, so an installed module of this name wins.
    own = getattr(module, "__file__", None)
    if path is not None and (own is None or not path.samefile(own)):
        raise PluginError(
            f"{setting}: {path}: {_where(module)} already has the name {name}; rename the file, because a plugin must "
            "not shadow an installed module"
        )
    _loaded[name] = module
    _own_packages.add(name.partition(".")[0])
    return module


def _import(name: str, folder: Path | None, setting: str) -> ModuleType:
    """Import a module that is installed or in `folder`."""
    last = None if folder is None or str(folder.absolute()) in sys.path else str(folder.absolute())
    if last is not None:
        sys.path.append(last)
    importlib.invalidate_caches()
    module = None
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # the module imports a missing one
            raise PluginError(f"{setting}: {name}: importing it raised {_one_line(error)}") from error
        where = "" if folder is None else f" or in {folder}"
        raise PluginError(f"{setting}: no module {show(name)} is installed{where}; {_ALLOWED}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{setting}: {name}: importing it raised {_one_line(error)}") from error
    finally:
        # A module from this folder may import its neighbours later; for any other one, the path was only a try.
        if last is not None and (module is None or _file_in(module, Path(last)) is None):
            sys.path.remove(last)
    return module


def _is_path(entry: str) -> bool:
    return entry.endswith(".py") or "/" in entry


def _root_and_name(path: Path, setting: str) -> tuple[Path, str]:
    """The folder to import a file from, and its module name: `b` for `a/b.py`, or `a.b` if `a` has an `__init__.py`."""
    path = path.absolute()
    if path.suffix != ".py":
        raise PluginError(f"{setting}: {path} is not a .py file; {_ALLOWED}")
    parts = [] if path.stem == "__init__" else [path.stem]
    folder = path.parent
    while is_file(folder / "__init__.py"):
        parts.insert(0, folder.name)
        folder = folder.parent
    return folder, ".".join(parts)


def _known_name(entry: str) -> str:
    """The module name of an entry of `plugins`."""
    return _root_and_name(Path(entry), "plugins")[1] if _is_path(entry) and entry.endswith(".py") else entry


def _absolute(entry: str) -> str | None:
    """The absolute path of a loaded module that is next to the recipe or was given as a path; None for any other."""
    folder = _recipe_folder.get()
    if _is_path(entry):
        return str(((folder or Path.cwd()) / expand(entry, "plugins")).absolute())
    found = None if folder is None or entry not in _loaded else _file_in(_loaded[entry], folder)
    if found is not None and _root_and_name(found, "plugins")[1] != entry:
        raise PluginError(f"plugins: {entry}: {found.parent} needs an __init__.py to be a package")
    return None if found is None else str(found.absolute())


def _file_in(module: ModuleType, folder: Path) -> Path | None:
    """The module's file if it is the one that `folder` has for its name; else None."""
    place = folder.joinpath(*module.__name__.split("."))
    own = getattr(module, "__file__", None)
    candidates = (place.with_name(f"{place.name}.py"), place / "__init__.py")
    return next((path for path in candidates if own is not None and is_file(path) and path.samefile(own)), None)


def _python_files(module: ModuleType) -> Iterator[Path]:
    if hasattr(module, "__path__"):
        for folder in module.__path__:
            yield from (path for path in Path(folder).rglob("*.py") if path.is_file())
    elif getattr(module, "__file__", None) is not None:
        yield Path(str(module.__file__))


def _checked(found: object, base: Class, kind: str, place: str) -> Class:
    if not _derives(found, base):
        raise PluginError(f"{place} is not a {kind}; allowed: a class that derives from {_public(base)}")
    check_signatures(found, base, place)  # type: ignore[arg-type]
    return found  # type: ignore[return-value]


def check_signatures(cls: type, base: type, place: str) -> None:
    """Raise PluginError for a method that `cls` overrides and that cannot be called like the one of `base`."""
    for name, expected in inspect.getmembers(base, inspect.isfunction):
        own = inspect.getattr_static(cls, name)
        generated = name.startswith("__") and (name != "__init__" or dataclasses.is_dataclass(cls))
        if own is expected or generated or isinstance(own, staticmethod | classmethod):
            continue
        parameters = inspect.signature(expected).parameters.values()
        positional = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
        keyword = {each.name: None for each in parameters if each.kind is each.KEYWORD_ONLY}
        try:
            inspect.signature(own).bind(*positional, **keyword)
        except TypeError as error:
            words = ", ".join([*(each.name for each in positional), *(f"{key}=..." for key in keyword)])
            raise PluginError(f"{place}: its {name} cannot be called as {name}({words}): {error}") from error


def _classes_of(module: ModuleType, base: Class) -> dict[str, Class]:
    """The classes derived from `base` that a module defines itself, by name."""
    found = {key: value for key, value in vars(module).items() if _derives(value, base)}
    return {key: value for key, value in found.items() if value.__module__ == module.__name__}


def _derives(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _public(base: type) -> str:
    # Users import it from the package, as `cl_dist.methods.Method`.
    return f"{base.__module__.rpartition('.')[0]}.{base.__name__}"


def _where(module: ModuleType) -> str:
    own = getattr(module, "__file__", None)
    return f"module {module.__name__} ({own})" if own else f"module {module.__name__}"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {shorten(text, 300)}" if text else type(error).__name__
