"""Python processes of this project never import modules from the working folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from cl_dist import __version__
from cl_dist.launch.child import PROGRAM, python_command
from tests.ranks import REPOSITORY

TRAP = "raise SystemExit('code from the working folder was run')"
VERSION = f"cl-dist {__version__}\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with modules named like those of Python, of libraries and of this project."""
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


def test_our_own_processes_ignore_the_working_folder(folder: Path) -> None:
    assert run([*python_command(PROGRAM), "--version"], folder) == VERSION
    assert run([*python_command(PROGRAM), "--version"], folder, PYTHONSAFEPATH="1") == VERSION
    assert "No module named 'mine'" in run(python_command("mine:main"), folder)


def test_so_does_python_m_cl_dist(folder: Path) -> None:
    (folder / "cl_dist.py").unlink()  # `python -m` itself would import it
    assert run([sys.executable, "-m", "cl_dist", "--version"], folder) == VERSION
    assert run([sys.executable, "-m", "cl_dist", "--version"], folder, PYTHONSAFEPATH="1") == VERSION
    # Without `site`, an editable installation does not load pathlib early, and parts of the package may not be found.
    (folder / "importlib.py").unlink()  # Python itself needs it then
    paths = os.pathsep.join([str(REPOSITORY), sysconfig.get_path("purelib")])
    assert "working folder" not in run([sys.executable, "-S", "-m", "cl_dist", "--version"], folder, PYTHONPATH=paths)


def test_pythonpath_still_counts(folder: Path) -> None:
    """Even if it names the working folder, which is then on the path twice."""
    for name in ("importlib", "pathlib", "cl_dist"):
        (folder / f"{name}.py").unlink()
    for where in (folder, Path("/")):
        assert run([*python_command("mine:main"), "a", "b c"], where, PYTHONPATH=str(folder)) == "['a', 'b c']\n"
    program = [sys.executable, "-m", "cl_dist", "--version"]
    assert run(program, folder, PYTHONPATH=str(folder)).endswith("code from the working folder was run")
