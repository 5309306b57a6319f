"""Two checkouts, one of them installed: each runs its own code, in the processes that it starts too."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY

FOLDERS = ("benchmarks", "kernels", "launch")
PROBE = """
import subprocess, sys
from importlib.util import find_spec

def show():
    for name in ("cl_dist", "cl_dist.benchmarks", "cl_dist.kernels", "cl_dist.launch.local"):
        print(find_spec(name).origin)
    print([name for name in ("benchmarks", "kernels", "launch") if find_spec(name)])

def start():
    from cl_dist.launch.child import python_command
    sys.exit(subprocess.run(python_command("probe:show"), cwd="/").returncode)
"""


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout, which nobody has installed."""
    root = tmp_path_factory.mktemp("second")
    for name in ("cl_dist", *FOLDERS):
        shutil.copytree(REPOSITORY / name, root / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    return root


def run(command: list[str], folder: Path, *on_path: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, on_path))}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    """A folder with a module that shows where packages are found."""
    (tmp_path / "probe.py").write_text(PROBE)
    return tmp_path


def places(root: Path) -> list[str]:
    files = ("__init__.py", "benchmarks/__init__.py", "kernels/__init__.py", "launch/local.py")
    return [str(root / "cl_dist" / name) for name in files]


@pytest.mark.parametrize("function", ["show", "start"])
@pytest.mark.parametrize("named", ["on PYTHONPATH", "the working folder"])
def test_its_own_packages_are_found(second: Path, probe: Path, named: str, function: str) -> None:
    command = ["-c", f"import probe; probe.{function}()"]
    done = run(command, probe, second, probe) if named == "on PYTHONPATH" else run(command, second, probe)
    *found, top_level = done.stdout.splitlines()
    assert found == places(second), done.stderr
    if function == "start":
        assert (top_level == "[]") == (named != "on PYTHONPATH"), "PYTHONPATH counts, the parent's folder does not"


def test_the_command_line_runs_its_own_packages(second: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked"
    shutil.copytree(second, marked, symlinks=True)
    (marked / "launch" / "__init__.py").write_text("raise SystemExit('launch of the second checkout')\n")
    command = ["-m", "cl_dist", "doctor"]
    for done in (run(command, marked), run(command, tmp_path, marked)):
        assert done.stderr == "launch of the second checkout\n"


def test_the_installed_checkout_is_found_from_anywhere(probe: Path) -> None:
    done = run(["-c", "import probe; probe.show()"], probe)
    assert done.stdout.splitlines() == [*places(REPOSITORY), "[]"]


def test_links_are_all_there() -> None:
    for name in FOLDERS:
        assert (REPOSITORY / "cl_dist" / name).readlink() == Path("..", name)


@pytest.mark.slow
def test_a_wheel_holds_every_file_once(second: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(second, source, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    command = ["-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    done = run([*command, str(source)], tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = [path.relative_to(REPOSITORY) for path in (REPOSITORY / "cl_dist").rglob("*.py")]
    sources += [
        Path("cl_dist", path.relative_to(REPOSITORY)) for name in FOLDERS for path in (REPOSITORY / name).rglob("*.py")
    ]
    assert sorted(name for name in names if name.endswith(".py")) == sorted(map(str, sources))
    others = {name for name in names if not name.endswith(".py") and ".dist-info/" not in name}
    assert {"cl_dist/launch/job.sh", "cl_dist/recipes/quickstart.yaml", "cl_dist/py.typed"} <= others
    assert others == {str(path) for path in tracked_data()}
    metadata = zipfile.ZipFile(wheel).read(next(name for name in names if name.endswith("/METADATA"))).decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Project-URL: MIGU (paper), https://arxiv.org/abs/2406.17245\n" in metadata
    assert "Classifier: Typing :: Typed\n" in metadata
    head, _, page = metadata.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in head
    assert page.startswith("# cl_dist\n")
    [picture] = re.findall(r'alt="([^"]+)"', (REPOSITORY / "README.md").read_text(encoding="utf-8"))
    assert picture in page
    assert "<picture" not in page
    links = re.findall(r"\]\(([^)]*)\)|(?:src|href)=[\"']([^\"']*)", page)
    assert links
    assert [link for pair in links for link in pair if link and not link.startswith("https://")] == []


def tracked_data() -> list[Path]:
    """The package's files that are not code, as a checkout of the repository has them."""
    folders = ["cl_dist", *FOLDERS]
    listed = subprocess.run(["git", "ls-files", "-z", *folders], cwd=REPOSITORY, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [Path(name) for name in listed.stdout.split("\0") if name]
    files = [path for path in paths if path.suffix != ".py" and not (REPOSITORY / path).is_symlink()]
    files = [path for path in files if not path.is_relative_to("benchmarks/results")]
    return [path if path.parts[0] == "cl_dist" else Path("cl_dist", path) for path in files]
