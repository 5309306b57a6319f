"""Which methods there are: built-in ones, what installed packages offer, and `module:Class` of the user's own.

A room, that is a package in this folder with a `config.py`, is found by itself. Its settings are imported, its method
is not: a recipe is checked without torch. Only a class of the user's own is imported to be asked for its settings.
"""

from __future__ import annotations

import json
import pkgutil
from collections.abc import Collection, Mapping
from functools import cache
from importlib import import_module
from inspect import getdoc
from typing import Annotated, Any, get_args

from pydantic import PlainValidator, SerializeAsAny, TypeAdapter, ValidationInfo
from pydantic_core import PydanticCustomError

from cl_dist.config.plugins import PluginError, load_class, load_offered, loaded_classes, names_class, offered
from cl_dist.methods.config import Exclusion, MethodConfig, Role, VariedConfig

GROUP = "cl_dist.methods"
"""Entry points with which an installed package offers methods."""
DEFAULT = "sequential"
"""The method of a recipe that names none."""
_PACKAGE = "cl_dist.methods"
_SETTING = "method.name"
MethodClass = type[Any]
"""A class that derives from `cl_dist.methods.Method`, which is of a higher layer than this catalogue."""
_used: dict[str, MethodClass] = {}
"""Methods that are not built in, by the names that recipes of this process have used."""


@cache
def built_in() -> Mapping[str, type[MethodConfig]]:
    """The built-in methods' settings, by name."""
    rooms = (
        f"{_PACKAGE}.{entry.name}" for entry in pkgutil.iter_modules(import_module(_PACKAGE).__path__) if entry.ispkg
    )
    modules = [import_module(f"{room}.config") for room in rooms if _has_config(room)]
    classes = [value for module in modules for value in vars(module).values() if _is_own(value, module.__name__)]
    return {_names_of(cls)[0]: cls for cls in classes}


def _has_config(room: str) -> bool:
    return any(entry.name == "config" for entry in pkgutil.iter_modules(import_module(room).__path__))


def _is_own(value: object, module: str) -> bool:
    """Whether a room's `config.py` defines this as a method's settings, rather than as what several share."""
    if not isinstance(value, type) or not issubclass(value, MethodConfig):
        return False
    return value.__module__ == module and len(_names_of(value)) == 1


def _names_of(cls: type[MethodConfig]) -> tuple[str, ...]:
    """The names that settings may have: one, or those of the methods that share them."""
    fields = cls.__pydantic_fields__  # type: ignore[attr-defined]
    return get_args(fields["name"].annotation)


def known() -> Mapping[str, type[MethodConfig]]:
    """Settings by name of every method that can be named without importing anything more: the built-in ones, and those
    of plugins that are loaded already.
    """
    own = {**loaded_classes(_base()), **_used}
    return {**built_in(), **{name: settings_class(cls, name) for name, cls in own.items()}}


def config_class(name: object) -> type[MethodConfig] | None:
    """A method's settings by its name; None where there is no such method. Raises `PluginError` (see `plugins`)."""
    if not isinstance(name, str):
        return None
    if name in built_in():
        return built_in()[name]
    method = method_class(name)
    return None if method is None else settings_class(method, name)


def method_class(name: str) -> MethodClass | None:
    """A method's class by its name; None where there is no such method. Raises `PluginError`."""
    if name in built_in():
        module, _, attribute = built_in()[name].METHOD.partition(":")
        cls: MethodClass = getattr(import_module(module), attribute)
        return cls
    if name in _used:
        return _used[name]
    if names_class(name):
        found: MethodClass = load_class(name, _base(), "method", _SETTING)
    elif name in offered(GROUP):
        found = load_offered(offered(GROUP)[name], _base(), "method", _SETTING, built_in())
    else:
        return None
    settings_class(found, name)
    _used[name] = found
    return found


def settings_class(method: MethodClass, name: str) -> type[MethodConfig]:
    """The settings that a method of the user's own declares as `Config`. Raises `PluginError` for what is none."""
    config = method.Config
    if not (isinstance(config, type) and issubclass(config, MethodConfig) and "__pydantic_fields__" in vars(config)):
        raise PluginError(
            f"{_SETTING}: {name}: its Config is not a class of settings; allowed: a class that derives from "
            "cl_dist.methods.MethodConfig and is decorated with cl_dist.methods.settings"
        )
    _check_settings(config, f"{_SETTING}: {name}: its Config")
    return config


def _check_settings(config: type[MethodConfig], place: str) -> None:
    """Raise `PluginError` for settings, or facts about the method, that nothing could do with."""
    from cl_dist.config.fields import check_own_settings  # which itself reads the methods' settings

    check_own_settings(config, place, {*dir(VariedConfig), "by_task"})
    for attribute, kind in (("ROLES", Role), ("EXCLUDES", Exclusion)):
        entries = getattr(config, attribute)
        if not isinstance(entries, Collection) or not all(isinstance(entry, kind) for entry in entries):
            raise PluginError(
                f"{place}: {attribute} is not allowed; allowed: a tuple of cl_dist.methods.{kind.__name__}, such as "
                f"({kind.__name__}{'.ANCHORS' if kind is Role else '(...)'},)"
            )


def summaries() -> dict[str, str]:
    """What every method is, by its name; those that installed packages offer too."""
    found = {name: _summary(cls) for name, cls in built_in().items()}
    own = {name: _summary(cls) for name, cls in {**loaded_classes(_base()), **_used}.items()}
    for name, entry in offered(GROUP).items():
        try:
            own[name] = _summary(load_offered(entry, _base(), "method", _SETTING, built_in()))
        except PluginError as error:  # one broken package does not hide the others
            own[f"{name} ({entry.value})"] = f"cannot be used: {error}"
    return found | own


def _summary(cls: type) -> str:
    """The first paragraph of a class's docstring, in one line."""
    return " ".join((getdoc(cls) or "").partition("\n\n")[0].split())


def default_method() -> MethodConfig:
    """The settings of the method of a recipe that names none."""
    return built_in()[DEFAULT](name=DEFAULT)


def _base() -> MethodClass:
    """`Method` itself. Its module is of a higher layer, and comes in by name as every method's does."""
    base: MethodClass = import_module(f"{_PACKAGE}.protocol").Method
    return base


def _read(value: Any, info: ValidationInfo) -> MethodConfig:
    """An entry of a recipe's `method`: which settings it may have depends on its name."""
    if isinstance(value, MethodConfig):
        return value
    cls = config_class(value.get("name")) if isinstance(value, Mapping) else None
    if cls is None:
        raise PydanticCustomError("unknown_method", "Input should be the settings of a method, with its name")
    reader = TypeAdapter(cls)
    if info.mode == "json":  # a recipe's text, which is read strictly (see config.load)
        return reader.validate_json(json.dumps(value), strict=True)
    return reader.validate_python(value)


MethodEntry = Annotated[SerializeAsAny[MethodConfig], PlainValidator(_read)]
"""The type of an entry of a recipe's `method`."""
