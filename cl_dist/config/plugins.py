"""Code that a recipe names: methods and data formats of your own, found by name.

`module:Class` names a class. Its module is an installed one, lies beside the recipe, or is listed in the recipe's
`plugins`, by name or as the path of a `.py` file. Installed packages may also offer classes under plain names, as entry
points. Nothing is imported unless it is named, and the recipe's folder comes last on `sys.path`: a file that happens to
lie there never shadows anything that is installed. Imports no framework; a plugin may.
"""

from __future__ import annotations

import importlib
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

_ALLOWED = "allowed: the name of a module that is installed or lies beside the recipe, or the path of a .py file"
_recipe_folder: ContextVar[Path | None] = ContextVar("recipe_folder", default=None)
_loaded: dict[str, ModuleType] = {}
"""Every module that a recipe of this process has named."""
_own_packages: set[str] = set()
"""Top-level names of the modules and packages that methods and formats of the user's own came from."""


class PluginError(BadInput):
    """A plugin is missing, fails while it is imported, or is not what its name promises."""


@contextmanager
def beside(folder: Path) -> Iterator[None]:
    """Within this context, modules are also looked for in a recipe's `folder`."""
    token = _recipe_folder.set(folder)
    try:
        yield
    finally:
        _recipe_folder.reset(token)


def names_class(name: object) -> bool:
    """Whether a method's or a format's name has the form `module:Class`."""
    return isinstance(name, str) and ":" in name


def load_plugins(entries: object, *, known: bool = False) -> None:
    """Import the modules that a recipe lists in `plugins`; anything but a list of texts is left to the recipe's checks.

    known: an entry whose module another recipe has named already means that one, wherever its file is now (the stored
    recipe of a project that was moved or copied). Raises `PluginError`.
    """
    for entry in entries if isinstance(entries, list | tuple) else ():
        if isinstance(entry, str) and not (known and _known_name(entry) in _loaded):
            _load(entry, "plugins")


def load_class(name: str, base: Class, kind: str, setting: str) -> Class:
    """The class that `module:Class` names.

    Args:
        name: As the recipe has it.
        base: What the class must derive from.
        kind: "method" or "format", for messages.
        setting: Where the name stands, for messages.

    Raises:
        PluginError: There is no such module or class, or it is not a `base`.
    """
    written, _, attribute = name.partition(":")
    module = _load(written, setting)
    place = f"{setting}: {shorten(name)}"
    found = getattr(module, attribute, None) if attribute.isidentifier() else None
    own = [key for key, value in vars(module).items() if _derives(value, base) and value.__module__ == module.__name__]
    if found is None:
        has = f"; its {kind}s are {', '.join(own)}{did_you_mean(attribute, own)}" if own else f"; it has no {kind}"
        raise PluginError(f"{place}: {_where(module)} has no class {show(attribute)}{has}")
    return _checked(found, base, kind, place)


def loaded_classes(base: Class) -> dict[str, Class]:
    """The classes derived from `base` in the modules that recipes of this process have named, as `module:Class`."""
    return {
        f"{name}:{key}": value
        for name, module in _loaded.items()
        for key, value in vars(module).items()
        if _derives(value, base) and value.__module__ == module.__name__
    }


@cache
def offered(group: str) -> Mapping[str, EntryPoint]:
    """What installed packages offer in an entry-point group, by name; none of it is imported."""
    return {entry.name: entry for entry in entry_points(group=group)}


def load_offered(entry: EntryPoint, base: Class, kind: str, setting: str, built_in: Iterable[str]) -> Class:
    """The class behind an entry point (arguments and errors as for `load_class`); a built-in name is refused."""
    package = f" of package {entry.dist.name}" if entry.dist is not None else ""
    place = f"{setting}: {entry.name} (entry point {entry.value}{package})"
    if entry.name in built_in:
        raise PluginError(f"{place}: a built-in {kind} has this name; its package must offer it under another one")
    try:
        found = entry.load()
    except (Exception, SystemExit) as error:
        raise PluginError(f"{place}: loading it raised {_told(error)}") from error
    _own_packages.add(entry.module.partition(".")[0])
    return _checked(found, base, kind, place)


def own_fault(error: BaseException) -> str | None:
    """A sentence about an exception that was raised in, or below, code of the user's own; None: that had no part in it.

    It names the innermost line of the user's code.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
        if package in _own_packages and package != "cl_dist":
            code = frame.f_code
            return f"{code.co_filename}, line {line}, in {code.co_name}: your own code raised {_told(error)}"
    return None


def written_out(entries: Iterable[str], classes: Iterable[str]) -> tuple[str, ...]:
    """A recipe's `plugins` for readers in any folder: what lies beside the recipe becomes an absolute path, and the
    modules of `classes` (names of the form `module:Class`) that lie there are added.

    Call it after the entries and classes were loaded, in the same `beside`.
    """
    found = [_absolute(entry) or entry for entry in entries]
    names = (name.partition(":")[0] for name in classes)
    found += [path for name in names if (path := _absolute(name)) is not None]
    return tuple(dict.fromkeys(found))


def source_files(modules: Iterable[str]) -> list[tuple[str, Path]]:
    """The Python files of loaded modules, by name; of a module in a package, all files of that package."""
    files: dict[str, Path] = {}
    for name in modules:
        top = sys.modules[name.partition(".")[0]]
        for path in _python_files(top):
            root = path.parent if not hasattr(top, "__path__") else Path(next(iter(top.__path__))).parent
            files[path.relative_to(root).as_posix()] = path
    return sorted(files.items())


def module_names(entries: Iterable[str], classes: Iterable[str]) -> list[str]:
    """Names of the modules that a recipe's `plugins` and its names of the form `module:Class` stand for."""
    names = [*map(_known_name, entries), *(name.partition(":")[0] for name in classes)]
    return [name for name in dict.fromkeys(names) if name in _loaded]


def _load(entry: str, setting: str) -> ModuleType:
    """Import what an entry of `plugins`, or the first half of `module:Class`, names."""
    folder = _recipe_folder.get()
    if _is_path(entry):
        path = (folder or Path.cwd()) / expand(entry, setting)
        if not is_file(path):
            raise PluginError(f"{setting}: {shorten(entry, 300)}: there is no such file; {_ALLOWED}")
        folder, name = _root_and_name(path, setting)
    else:
        path, name = None, entry
    if not all(part.isidentifier() for part in name.split(".")):
        what = f"{show(name)} is not the name of a module"
        raise PluginError(f"{setting}: {what if path is None else f'{path}: {what}; rename the file'}; {_ALLOWED}")
    module = _import(name, folder, setting)
    if not isinstance(module, ModuleType):
        raise PluginError(f"{setting}: {name}: importing it left another object in its place (sys.modules)")
    own = getattr(module, "__file__", None)
    if path is not None and (own is None or not path.samefile(own)):
        raise PluginError(
            f"{setting}: {path}: the name {name} belongs to {_where(module)} already; rename the file, since nothing "
            "that is installed may be shadowed"
        )
    _loaded[name] = module
    _own_packages.add(name.partition(".")[0])
    return module


def _import(name: str, folder: Path | None, setting: str) -> ModuleType:
    """Import a module, which may lie in `folder`; the folder stays at the end of sys.path where the module does."""
    last = None if folder is None or str(folder.absolute()) in sys.path else str(folder.absolute())
    if last is not None:
        sys.path.append(last)
    importlib.invalidate_caches()
    module = None
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # something that the module imports
            raise PluginError(f"{setting}: {name}: importing it raised {_told(error)}") from error
        where = "" if folder is None else f" or in {folder}"
        raise PluginError(f"{setting}: no module {show(name)} is installed{where}; {_ALLOWED}") from error
    except (Exception, SystemExit) as error:
        raise PluginError(f"{setting}: {name}: importing it raised {_told(error)}") from error
    finally:
        if last is not None and (module is None or _file_in(module, Path(last)) is None):
            sys.path.remove(last)
    return module


def _is_path(entry: str) -> bool:
    return entry.endswith(".py") or "/" in entry


def _root_and_name(path: Path, setting: str) -> tuple[Path, str]:
    """The folder to import a file from, and its name there: `a/b.py` is `a.b` where `a` has an `__init__.py`."""
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
    """The absolute path of a loaded module that lies beside the recipe or was named by its path; None: neither."""
    folder = _recipe_folder.get()
    if _is_path(entry):
        return str(((folder or Path.cwd()) / expand(entry, "plugins")).absolute())
    found = None if folder is None or entry not in _loaded else _file_in(_loaded[entry], folder)
    if found is not None and _root_and_name(found, "plugins")[1] != entry:
        raise PluginError(f"plugins: {entry}: {found.parent} needs an __init__.py to be a package")
    return None if found is None else str(found.absolute())


def _file_in(module: ModuleType, folder: Path) -> Path | None:
    """The module's file where it lies in `folder` under its own name."""
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
    return found  # type: ignore[return-value]


def _derives(value: object, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _public(base: type) -> str:
    """`cl_dist.methods.Method`: where people import it from."""
    return f"{base.__module__.rpartition('.')[0]}.{base.__name__}"


def _where(module: ModuleType) -> str:
    """A module with its file, for messages."""
    own = getattr(module, "__file__", None)
    return f"module {module.__name__} ({own})" if own else f"module {module.__name__}"


def _told(error: BaseException) -> str:
    """An exception's type and text in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {shorten(text, 300)}" if text else type(error).__name__
