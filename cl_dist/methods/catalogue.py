"""Finds methods: built-in ones, those that installed packages offer, and users' own, given as `module:Class`.

Every package in this folder with a `config.py` is a built-in method. Only its settings are imported, not its code, so
that a recipe is checked without torch. A user's own class has to be imported to get its settings.
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

from cl_dist.config.plugins import (
    PluginError,
    check_signatures,
    load_class,
    load_offered,
    loaded_classes,
    names_class,
    offered,
)
from cl_dist.methods.config import Exclusion, MethodConfig, Role, VariedConfig

GROUP = "cl_dist.methods"
"""Entry point group in which installed packages offer methods."""
DEFAULT = "sequential"
"""The method of a recipe that does not name one."""
_PACKAGE = "cl_dist.methods"
_SETTING = "method.name"
MethodClass = type[Any]
"""A class that derives from `cl_dist.methods.Method`; not annotated as such, because its layer is above this one."""
_used: dict[str, MethodClass] = {}
"""Methods from outside the package that this process has used, by the names that recipes gave them."""


@cache
def built_in() -> Mapping[str, type[MethodConfig]]:
    """The built-in methods' settings, by name."""
    found: dict[str, type[MethodConfig]] = {}
    for entry in pkgutil.iter_modules(import_module(_PACKAGE).__path__):
        package = f"{_PACKAGE}.{entry.name}"
        if not entry.ispkg or all(
            inner.name != "config" for inner in pkgutil.iter_modules(import_module(package).__path__)
        ):
            continue  # a module, or a package with what several methods share
        module = import_module(f"{package}.config")
        for value in vars(module).values():
            # The module may also import settings, or define a base class, which lists the names of several methods.
            own = isinstance(value, type) and issubclass(value, MethodConfig) and value.__module__ == module.__name__
            names = get_args(value.__pydantic_fields__["name"].annotation) if own else ()
            if len(names) == 1:
                found[names[0]] = value
    return found


def method_inputs() -> set[str]:
    """Keys of the settings that say where a data set of a method is (`MethodConfig.DATA`), as in `INPUT_SETTINGS`."""
    return {f"method[].{setting}" for cls in known().values() for setting in cls.DATA}


def known() -> Mapping[str, type[MethodConfig]]:
    """Settings by name of all methods that are known without further imports: built-in ones and loaded plugins."""
    own = {**loaded_classes(_base()), **_used}
    return {**built_in(), **{name: settings_class(cls, name) for name, cls in own.items()}}


def config_class(name: object) -> type[MethodConfig] | None:
    """A method's settings by its name, or None if there is no such method. Raises `PluginError` (see `plugins`)."""
    if not isinstance(name, str):
        return None
    if name in built_in():
        return built_in()[name]
    method = method_class(name)
    return None if method is None else settings_class(method, name)


def method_class(name: str) -> MethodClass | None:
    """A method's class by its name, or None if there is no such method. Raises `PluginError`."""
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
    """The settings class that a user's method declares as `Config`. Raises `PluginError` if it is not one."""
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
    check_signatures(config, VariedConfig if issubclass(config, VariedConfig) else MethodConfig, place)
    for attribute, kind in (("ROLES", Role), ("EXCLUDES", Exclusion)):
        entries = getattr(config, attribute)
        if not isinstance(entries, Collection) or not all(isinstance(entry, kind) for entry in entries):
            raise PluginError(
                f"{place}: {attribute} is not allowed; allowed: a tuple of cl_dist.methods.{kind.__name__}, such as "
                f"({kind.__name__}{'.ANCHORS' if kind is Role else '(...)'},)"
            )


def summaries() -> dict[str, str]:
    """One-line summaries of all methods by name, including those that installed packages offer."""
    found = {name: _summary(cls) for name, cls in built_in().items()}
    own = {name: _summary(cls) for name, cls in {**loaded_classes(_base()), **_used}.items()}
    for name, entry in offered(GROUP).items():
        try:
            own[name] = _summary(load_offered(entry, _base(), "method", _SETTING, built_in()))
        except PluginError as error:  # one broken package does not hide the others
            own[f"{name} ({entry.value})"] = f"cannot be used: {error}"
    return found | own


def _summary(cls: type) -> str:
    """The first paragraph of a class's docstring, as one line."""
    return " ".join((getdoc(cls) or "").partition("\n\n")[0].split())


def default_method() -> MethodConfig:
    """Settings of the default method."""
    return built_in()[DEFAULT](name=DEFAULT)


def _base() -> MethodClass:
    """The class `Method`, imported by name like every method, because its layer is above this one."""
    base: MethodClass = import_module(f"{_PACKAGE}.protocol").Method
    return base


def _read(value: Any, info: ValidationInfo) -> MethodConfig:
    """Read an entry of a recipe's `method`, whose name decides which settings it has."""
    if isinstance(value, MethodConfig):
        return value
    cls = config_class(value.get("name")) if isinstance(value, Mapping) else None
    if cls is None:
        raise PydanticCustomError("unknown_method", "Input should be the settings of a method, with its name")
    reader = TypeAdapter(cls)
    if info.mode == "json":  # the text of a recipe, which is read strictly (see config.load)
        return reader.validate_json(json.dumps(value), strict=True)
    return reader.validate_python(value)


MethodEntry = Annotated[SerializeAsAny[MethodConfig], PlainValidator(_read)]
"""The type of an entry of a recipe's `method`."""
