from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from cl_dist.config import plugins
from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.config.plugins import PluginError, beside, load_class, load_offered, load_plugins, written_out
from cl_dist.state.stored_files import stored_recipe
from tests.plugin_memory import plugins_forgotten
from tests.recipes import write_recipe


class Base:
    """What the classes of these tests derive from."""


OWN = """
from tests.config.test_plugins import Base

class Mine(Base):
    pass

class Other:
    pass
"""


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with plugins_forgotten():
        yield


def write(path: Path, text: str = OWN) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def find(name: str, folder: Path) -> type:
    with beside(folder):
        return load_class(name, Base, "method", "method.name")


def test_a_class_is_found_beside_the_recipe_and_written_out_with_its_absolute_path(tmp_path: Path) -> None:
    path = write(tmp_path / "own_module.py")
    assert find("own_module:Mine", tmp_path).__name__ == "Mine"
    with beside(tmp_path):
        assert written_out([], ["own_module:Mine"]) == (str(path),)
        assert written_out(["own_module"], ["own_module:Mine"]) == (str(path),)
    # From there it is found by anybody.
    del sys.modules["own_module"]
    plugins._loaded.clear()
    load_plugins([str(path)])
    assert find("own_module:Mine", tmp_path / "elsewhere").__name__ == "Mine"


def test_a_file_elsewhere_is_given_by_its_path(tmp_path: Path) -> None:
    path = write(tmp_path / "lib" / "own_module.py")
    with beside(tmp_path):
        load_plugins(["lib/own_module.py"])
        assert written_out(["lib/own_module.py"], ["own_module:Mine"]) == (str(path),)
    assert find("own_module:Mine", tmp_path).__name__ == "Mine"


def test_a_package_keeps_its_name(tmp_path: Path) -> None:
    write(tmp_path / "own_package" / "__init__.py", "")
    path = write(tmp_path / "own_package" / "inner.py", f"from own_package import helper\n{OWN}")
    write(tmp_path / "own_package" / "helper.py", "")
    assert find("own_package.inner:Mine", tmp_path).__name__ == "Mine"
    with beside(tmp_path):
        assert written_out([], ["own_package.inner:Mine"]) == (str(path),)
    names = [name for name, _ in plugins.source_files(["own_package.inner"])]
    assert names == ["own_package/__init__.py", "own_package/helper.py", "own_package/inner.py"]


def test_what_is_installed_is_never_shadowed(tmp_path: Path) -> None:
    path = write(tmp_path / "yaml.py", "raise SystemExit('imported')")
    with beside(tmp_path):
        load_plugins(["yaml"])
        assert written_out(["yaml"], []) == ("yaml",)
        assert str(tmp_path) not in sys.path
        with pytest.raises(PluginError, match=r"yaml\.py: module yaml .* already has the name yaml; rename the file"):
            load_plugins([str(path)])


def test_the_folder_comes_last_and_only_where_a_plugin_lies_in_it(tmp_path: Path) -> None:
    write(tmp_path / "own_module.py")
    before = list(sys.path)
    with beside(tmp_path):
        load_plugins(["json"])
        assert sys.path == before
        load_plugins(["own_module"])
    assert sys.path == [*before, str(tmp_path)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("own_modul:Mine", r'no module "own_modul" is installed or in .*; allowed: the name of a module'),
        ("own_module:Mime", r'has no class "Mime"; its methods are Mine; did you mean Mine\?'),
        ("own_module:Other", r"own_module:Other is not a method; allowed: a class that derives from tests.config.Base"),
        ("own_module:", r'has no class ""'),
        ("9own:Mine", r'"9own" is not the name of a module'),
        ("broken:Mine", r"broken: importing it raised ZeroDivisionError: division by zero"),
        ("needing:Mine", r"needing: importing it raised ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("ending:Mine", r"ending: importing it raised SystemExit: 3"),
        ("lib/none.py:Mine", r"lib/none.py: this file does not exist"),
    ],
)
def test_every_problem_of_a_plugin_is_one_sentence(name: str, message: str, tmp_path: Path) -> None:
    write(tmp_path / "own_module.py")
    write(tmp_path / "broken.py", "1 / 0")
    write(tmp_path / "needing.py", "import nowhere_at_all")
    write(tmp_path / "ending.py", "raise SystemExit(3)")
    before = list(sys.path)
    with pytest.raises(PluginError, match=message) as caught:
        find(name, tmp_path)
    assert str(caught.value).startswith("method.name: ")
    assert "\n" not in str(caught.value)
    assert sys.path in (before, [*before, str(tmp_path)])


def test_an_entry_point_is_loaded_when_it_is_used_and_a_built_in_name_is_refused(tmp_path: Path) -> None:
    entry = EntryPoint("mine", f"{__name__}:Base", "group")
    wrong = EntryPoint("mine", "json:JSONDecoder", "group")
    with pytest.raises(PluginError, match=r"mine \(entry point json:JSONDecoder\) is not a method"):
        load_offered(wrong, Base, "method", "method.name", [])
    with pytest.raises(PluginError, match="a built-in method has this name"):
        load_offered(entry, Base, "method", "method.name", ["mine"])
    with pytest.raises(PluginError, match="loading it raised ModuleNotFoundError"):
        load_offered(EntryPoint("mine", "nowhere:X", "group"), Base, "method", "method.name", [])


def test_a_recipe_lists_modules_and_its_dump_finds_them_from_anywhere(tmp_path: Path) -> None:
    path = write(tmp_path / "own_module.py")
    recipe, _ = load_recipe(str(write_recipe(tmp_path, plugins=["own_module"])))
    assert recipe.plugins == (str(path),)
    stored = write(tmp_path / "elsewhere" / "config.yaml", dump_recipe(recipe))
    assert stored_recipe(stored) == recipe
    assert load_recipe(str(stored))[0] == recipe


def test_the_stored_recipe_of_a_moved_project_means_the_loaded_module(tmp_path: Path) -> None:
    old = write(tmp_path / "old" / "own_module.py")
    recipe, _ = load_recipe(str(write_recipe(tmp_path / "old", plugins=["own_module"])))
    stored = write(tmp_path / "config.yaml", dump_recipe(recipe))
    old.unlink()
    plugins._loaded.clear()
    with pytest.raises(PluginError, match="this file does not exist"):
        stored_recipe(stored)
    plugins._loaded["own_module"] = sys.modules["own_module"]
    assert stored_recipe(stored) == recipe


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ("own_module", r"plugins: \"own_module\" is not allowed; allowed: a list of strings"),
        ([3], r"plugins.0: 3 is not allowed"),
        (["a-b"], r'plugins: "a-b" is not the name of a module'),
    ],
)
def test_anything_but_a_list_of_modules_is_refused(listed: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(Exception, match=message):
        load_recipe(str(write_recipe(tmp_path, plugins=listed)))


def test_nothing_is_imported_that_no_recipe_names(tmp_path: Path) -> None:
    write(tmp_path / "own_module.py", "raise SystemExit('imported')")
    recipe = write_recipe(tmp_path)
    code = f"from cl_dist.config.load import load_recipe as l; l({str(recipe)!r}); import sys; print(sys.path[-1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != str(tmp_path)
