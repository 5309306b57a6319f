"""The commands know methods of the user's own: the one that docs/extending.md shows."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import pytest

from cl_dist.cli.failures import guarded
from cl_dist.config.plugins import beside, load_plugins, offered
from tests.cli.conftest import Command
from tests.plugin_memory import plugins_forgotten
from tests.test_extending import NAME, example, recipe


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    with plugins_forgotten():
        yield


def test_it_is_listed_and_explained(tmp_path: Path, command: Command) -> None:
    assert NAME not in command("methods")[1]
    recipe(tmp_path)
    code, listed, _ = command("methods", "--plugin", "projection.py")
    assert code == 0
    assert re.search(rf"^{NAME}\n +Gradient projection: removes the component along", listed, re.MULTILINE)
    explained = command("recipe", "--explain", "--plugin", "projection")[1]
    assert f"method({NAME}).strength\n    a number, at least 0, at most 1 (default: 1.0)\n" in explained
    assert "    Fraction of that component to remove." in explained


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("method.strenth=2", "method.strenth: unknown key; did you mean strength?"),
        ("method.strength=2", "method.strength: 2 is not allowed; allowed: a number, at least 0, at most 1"),
        ("method.name=projection:Gradient", "method.name: projection:Gradient: module projection (PATH) has no class "
         '"Gradient"; its methods are GradientProjection; did you mean GradientProjection?'),
    ],
)  # fmt: skip
def test_its_settings_are_checked(change: str, message: str, tmp_path: Path, command: Command) -> None:
    code, _, error = command("run", recipe(tmp_path), "--set", change)
    assert (code, error) == (2, f"cl-dist: error: {message}\n".replace("PATH", str(tmp_path / "projection.py")))


def test_its_name_may_be_typed(tmp_path: Path, command: Command) -> None:
    code, printed, _ = command("recipe", recipe(tmp_path, "sequential"), "--set", f"method.name={NAME}")
    assert code == 0
    assert f'name: "{NAME}"' in printed or f"name: {NAME}" in printed
    assert f"- {tmp_path / 'projection.py'}" in printed


def test_it_stands_in_a_comparison(tmp_path: Path, command: Command) -> None:
    path, out = recipe(tmp_path, "sequential"), tmp_path / "sweep"
    methods = f"sequential,{NAME}+replay,half={NAME}"
    words = ["compare", path, "--methods", methods, "--set-for", "half:method.strength=0.5", "--out", out]
    code, listed, error = command(*words, "--dry-run")
    assert code == 0, error
    assert [line.split()[1] for line in listed.splitlines()[1:]] == ["sequential", "GradientProjection+replay", "half"]
    assert '{"name": "projection:GradientProjection"}' in command(*words, "--print")[1]
    code, _, error = command("compare", path, "--methods", "projection:Gradient", "--out", out)
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith("cl-dist: error: --methods projection:Gradient: method.name: projection:Gradient: module")


def test_an_installed_package_offers_methods(tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    example(site)
    described = site / "drifting-1.0.dist-info"
    described.mkdir()
    (described / "METADATA").write_text("Metadata-Version: 2.1\nName: drifting\nVersion: 1.0\n")
    (described / "entry_points.txt").write_text(
        f"[cl_dist.methods]\ndrift = {NAME}\nmigu = {NAME}\nlost = nowhere:Lost\n"
    )
    monkeypatch.syspath_prepend(site)
    offered.cache_clear()
    try:
        listed = command("methods")[1]
        assert re.search(r"^drift\n +Gradient projection: removes the component along", listed, re.MULTILINE)
        together = " ".join(listed.split())
        assert "a built-in method has this name" in together
        assert "loading it raised ModuleNotFoundError: No module named 'nowhere'" in together
        code, printed, _ = command("recipe", "quickstart", "--set", "method={name: drift, strength: 0.5}")
        assert code == 0
        assert "strength: 0.5" in printed
        assert command("recipe", "quickstart", "--set", "method.name=lost")[0] == 2
        assert "threshold" in command("recipe", "quickstart", "--set", "method.name=migu")[1]
    finally:
        offered.cache_clear()


FAULTY = """
from typing import Annotated
from pydantic import Field
from cl_dist.methods import Method, MethodConfig, settings

class Faulty(Method):
    @settings
    class Config(MethodConfig):
        sizes: list[int] = Field(default_factory=list)
        strength: float = 1.0
        HERE
"""


@pytest.mark.parametrize(
    ("line", "change", "message"),
    [
        ("def check(self, recipe): recipe.nope", "", r"recipe: \S+faulty1\.py, line 11, in check: your own code"),
        ("def __post_init__(self): raise SystemExit(0)", "", r"recipe: .* in __post_init__: your own code raised Sys"),
        ("def __post_init__(self): assert False, 'sizes: odd'", "", r"method\.sizes: odd"),
        ("", "method.sizes=[a]", r'method\.sizes\.0: "a" is not allowed; allowed: a list of whole numbers'),
        ("rate: Annotated[float, Field(ge=0)] = -1", "", r".* faulty1:Faulty: its Config: rate: its default, -1,"),
        ("rate: 'Nowhere' = 1", "", r".* the types of its settings cannot be read: name 'Nowhere' is not defined"),
        ("check: int = 1", "", r".* check already has a meaning; give the setting another name"),
        ("def check(self): pass", "", r".* its Config: its check cannot be called as check\(self, recipe\): too many"),
        ("EXCLUDES = 'replay'", "", r".* EXCLUDES is not allowed; allowed: a tuple of cl_dist\.methods\.Exclusion"),
    ],
)  # fmt: skip
def test_a_fault_in_it_is_reported_as_its_own(
    line: str, change: str, message: str, tmp_path: Path, command: Command
) -> None:
    path = recipe(tmp_path, "faulty1:Faulty")
    (tmp_path / "faulty1.py").write_text(FAULTY.replace("HERE", line))
    code, _, error = command("run", path, *(["--set", change] if change else []))
    assert (code, error.count("\n")) == (2, 1), error
    assert re.match(f"cl-dist: error: {message}", error)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("def before_step(self): pass", "its before_step cannot be called as before_step(self, step): too many"),
        ("def __init__(self): pass", "its __init__ cannot be called as __init__(self, config): too many"),
        ("before_update = 3", "its before_update cannot be called as before_update(self): 3 is not a callable object"),
        ("def before_update(self, extra=None): pass", None),
        ("def before_step(self, *args): pass", None),
    ],
)
def test_its_methods_can_be_called_like_the_protocols(
    line: str, message: str | None, tmp_path: Path, command: Command
) -> None:
    path = recipe(tmp_path, "faulty2:Faulty")
    (tmp_path / "faulty2.py").write_text(f"{FAULTY.replace('HERE', '')}\n    {line}\n")
    code, _, error = command("recipe", path)
    assert code == (2 if message else 0), error
    assert (message or "") in error


@pytest.mark.parametrize("error", ["KeyError('mine')", "SystemExit(0)"])
def test_what_it_raises_in_training_is_not_an_internal_error(
    error: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "raising1.py").write_text(f"def train(arguments):\n    raise {error}\n")
    with beside(tmp_path):
        load_plugins(["raising1"])
    code = guarded(Namespace(command=sys.modules["raising1"].train, debug=False))
    told = capsys.readouterr().err
    assert code == 1
    assert f"{tmp_path / 'raising1.py'}, line 2, in train: your own code raised {error.partition('(')[0]}" in told
