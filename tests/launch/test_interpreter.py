"""What lies in the working folder is not imported by what is started there."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from cl_dist import __version__
from cl_dist.launch.interpreter import PROGRAM, python_command
from tests.ranks import REPOSITORY

TRAP = "raise SystemExit('code from the working folder was run')"
VERSION = f"cl-dist {__version__}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with modules that are named like Python's own, and like libraries."""
    for name in ("importlib", "pathlib", "argparse", "yaml", "pydantic", "rich", "cl_dist"):
        (tmp_path / f"{name}.py").write_text(TRAP)
    (tmp_path / "mine.py").write_text("import sys\ndef main():\n    print(sys.argv[1:])\n")
    return tmp_path


def run(command: list[str], folder: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=folder, env={**environment, **variables}, capture_output=True, text=True, check=False
    )
    return done.stdout + done.stderr.strip().rpartition("\n")[2]


def test_what_we_start_ignores_it(folder: Path) -> None:
    assert run([*python_command(PROGRAM), "--version"], folder) == VERSION
    assert run([*python_command(PROGRAM), "--version"], folder, PYTHONSAFEPATH="1") == VERSION
    assert "No module named 'mine'" in run(python_command("mine:main"), folder)


def test_a_launcher_may_start_the_module(folder: Path) -> None:
    (folder / "cl_dist.py").unlink()  # `python -m` itself would find it
    assert run([sys.executable, "-m", "cl_dist", "--version"], folder) == VERSION
    assert run([sys.executable, "-m", "cl_dist", "--version"], folder, PYTHONSAFEPATH="1") == VERSION
    # Without `site`, whose editable installations load pathlib beforehand, not all of the package may be found.
    (folder / "importlib.py").unlink()  # nor does Python itself do without it then
    paths = os.pathsep.join([str(REPOSITORY), sysconfig.get_path("purelib")])
    assert "working folder" not in run([sys.executable, "-S", "-m", "cl_dist", "--version"], folder, PYTHONPATH=paths)


def test_what_pythonpath_names_counts(folder: Path) -> None:
    """Also where it is the working folder, which is then on the path twice."""
    for name in ("importlib", "pathlib", "cl_dist"):
        (folder / f"{name}.py").unlink()
    for where in (folder, Path("/")):
        assert run([*python_command("mine:main"), "a", "b c"], where, PYTHONPATH=str(folder)) == "['a', 'b c']\n"
    program = [sys.executable, "-m", "cl_dist", "--version"]
    assert run(program, folder, PYTHONPATH=str(folder)).endswith("code from the working folder was run")
