"""A method is known in its own room, and everything else asks its settings: what a new method touches is one folder."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_dist import methods
from cl_dist.config.load import load_recipe
from cl_dist.methods import catalogue
from cl_dist.methods.catalogue import built_in
from cl_dist.methods.composed import compose

ROOT = Path(__file__).parents[2]
ROOMS = ROOT / "cl_dist" / "methods"
FAMILIES = {"tasl": "kif", "recurrent_kif": "kif", "olora": "inclora"}
"""Rooms that build on another one."""
REASONS = {
    ("cl_dist/methods/catalogue.py", "sequential"): "the method of a recipe that names none",
    (
        "cl_dist/methods/shared/samples.py",
        "replay",
    ): "the name of a stream of random numbers, which must not change",
}
DATA_FORMATS = {"tasl"}
"""Names of methods that are names of data formats too, outside of `cl_dist/methods`."""


def sources() -> Iterator[Path]:
    for folder in ("cl_dist", "kernels", "launch"):
        yield from sorted((ROOT / folder).rglob("*.py"))


def words(path: Path) -> Iterator[str]:
    """Every text, name and attribute of a file, and the rooms that it imports from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cl_dist.methods."):
            yield str(node.module).split(".")[2]


def room_of(path: Path) -> str:
    """The room that a file lies in; "" outside of all."""
    parts = path.relative_to(ROOMS).parts if path.is_relative_to(ROOMS) else ()
    return parts[0] if len(parts) > 1 else ""


def classes() -> dict[str, str]:
    """The room of every class of settings and every method's class."""
    found = {}
    for name, cls in built_in().items():
        found[cls.__name__] = name
        room, _, method = cls.METHOD.partition(":")
        found[method] = room.split(".")[2]
    return found


def strangers() -> Iterator[str]:
    """Where a method is named outside of its room."""
    homes = {**{name: name for name in built_in()}, **classes()}
    for path in sources():
        place, own = path.relative_to(ROOT).as_posix(), room_of(path)
        for word in dict.fromkeys(words(path)):
            if word not in homes or homes[word] in (own, FAMILIES.get(own)) or own == FAMILIES.get(homes[word]):
                continue
            if (place, word) in REASONS or (word in DATA_FORMATS and not path.is_relative_to(ROOMS)):
                continue
            yield f"{place}: {word}"


def test_no_method_is_named_outside_its_room() -> None:
    assert list(strangers()) == []


def test_every_exception_is_one() -> None:
    assert [key for key in REASONS if key[1] not in words(ROOT / key[0])] == []


ROOM = {
    "__init__.py": '"""A room."""\n',
    "config.py": """
from typing import ClassVar, Literal

from cl_dist.methods.config import MethodConfig, settings


@settings
class WandererConfig(MethodConfig):
    '''Wanderer: goes where it likes.'''

    METHOD: ClassVar[str] = "cl_dist.methods.wanderer.method:Wanderer"

    name: Literal["wanderer"]
    '''Name of the method.'''
    miles: int = 3
    '''How far.'''
""",
    "method.py": """
from cl_dist.methods.protocol import Method


class Wanderer(Method):
    '''Goes where it likes.'''
""",
}


@pytest.fixture
def wanderer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One more room in the package, for a while."""
    folder = tmp_path / "wanderer"
    folder.mkdir()
    for name, text in ROOM.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    built_in.cache_clear()
    yield
    monkeypatch.undo()
    built_in.cache_clear()
    for name in [name for name in sys.modules if name.startswith("cl_dist.methods.wanderer")]:
        del sys.modules[name]


@pytest.mark.usefixtures("wanderer")
def test_a_new_room_is_found_by_itself() -> None:
    assert "wanderer" in built_in()
    assert catalogue.summaries()["wanderer"] == "Wanderer: goes where it likes."
    recipe, _ = load_recipe("quickstart", ["method.name=wanderer", "method.miles=5"])
    (method,) = compose(recipe.method).methods
    assert (type(method).__name__, method.config.miles) == ("Wanderer", 5)
    with pytest.raises(Exception, match=r"^method.mile: unknown key; did you mean miles\?$"):
        load_recipe("quickstart", ["method.name=wanderer", "method.mile=5"])


def test_every_built_in_method_has_its_class() -> None:
    """A misspelt `METHOD` would show when a run has loaded its model."""
    for name, cls in built_in().items():
        found = catalogue.method_class(name)
        assert found is not None
        assert issubclass(found, methods.Method)
        assert f"{found.__module__}:{found.__name__}" == cls.METHOD
