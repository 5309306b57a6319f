"""Built-in methods are found by their folders."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_dist import methods
from cl_dist.config.load import load_recipe
from cl_dist.methods import catalogue
from cl_dist.methods.catalogue import built_in
from cl_dist.methods.composed import compose

FILES = {
    "__init__.py": '"""A method."""\n',
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
    """Add a method to the package for one test."""
    folder = tmp_path / "wanderer"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path)])
    built_in.cache_clear()
    yield
    monkeypatch.undo()
    built_in.cache_clear()
    for name in [name for name in sys.modules if name.startswith("cl_dist.methods.wanderer")]:
        del sys.modules[name]


@pytest.mark.usefixtures("wanderer")
def test_a_new_folder_is_found_without_registration() -> None:
    assert "wanderer" in built_in()
    assert catalogue.summaries()["wanderer"] == "Wanderer: goes where it likes."
    recipe, _ = load_recipe("quickstart", ["method.name=wanderer", "method.miles=5"])
    (method,) = compose(recipe.method).methods
    assert (type(method).__name__, method.config.miles) == ("Wanderer", 5)
    with pytest.raises(Exception, match=r"^method.mile: unknown key; did you mean miles\?$"):
        load_recipe("quickstart", ["method.name=wanderer", "method.mile=5"])


def test_every_built_in_method_has_its_class() -> None:
    """Otherwise, a misspelt `METHOD` would only show once a run has loaded its model."""
    for name, cls in built_in().items():
        found = catalogue.method_class(name)
        assert found is not None
        assert issubclass(found, methods.Method)
        assert f"{found.__module__}:{found.__name__}" == cls.METHOD
