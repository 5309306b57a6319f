from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cl_dist.machine import OLDEST_DRIVERS
from tests.test_imports import SOURCES

ROOT = Path(__file__).parents[1]
UNLOCKED = {"wandb", "mlflow"}
"""Trackers that are too large for the lock; where they are installed, their tests run."""
COMMANDS = ["sh", "make", "cat", "env", "rm", "touch"]


def make(tmp_path: Path, commands: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make install` in a copy of the set-up files, on a machine that has just the given commands."""
    for name in ("Makefile", "setup.py", "requirements.lock", "requirements-triton.lock", "requirements-gpu.lock"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "bin").mkdir()
    for name in COMMANDS:
        commands.setdefault(name, str(shutil.which(name)))
    for name, target in commands.items():
        (tmp_path / "bin" / name).symlink_to(target)
    environment = {"PATH": str(tmp_path / "bin")}
    command = [str(tmp_path / "bin" / "make"), "install", *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_without_python(tmp_path: Path) -> None:
    done = make(tmp_path, {})
    assert done.returncode == 2
    assert "cl_dist cannot be set up: python3 is not installed. Install Python 3.10 or later" in done.stderr


def test_without_a_compiler(tmp_path: Path) -> None:
    done = make(tmp_path, {}, f"PYTHON={sys.executable}")
    assert done.returncode == 2
    assert "cl_dist cannot be set up: there is no C++ compiler (c++), which DeepSpeed needs" in done.stderr
    assert not (tmp_path / ".venv").exists()


def interpreter(body: str, tmp_path: Path) -> str:
    """A Python that differs from this one in one respect, as sitecustomize sees to."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(body)
    script = tmp_path / "other-python"
    script.write_text(f'#!{shutil.which("sh")}\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("difference", "message"),
    [
        ("import sys; sys.version_info = (3, 9, 18)", "is too old, Python 3.10 or later is required"),
        ("import sys; sys.modules['ensurepip'] = None", "has no venv. Install it (Debian: apt-get install"),
        ("import sysconfig; sysconfig.get_path = lambda name: '/'", "(Python.h), which DeepSpeed compiles against"),
    ],
)
def test_with_an_unfit_python(tmp_path: Path, difference: str, message: str) -> None:
    done = make(tmp_path, {}, f"PYTHON={interpreter(difference, tmp_path)}")
    assert done.returncode == 2
    assert message in done.stderr


def declared() -> dict[str, Requirement]:
    """What setup.py asks for, the extras included but for that of developers, by normalised name."""
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    given = {word.arg: word.value for word in call.keywords}
    extras = ast.literal_eval(given["extras_require"])
    needed = [
        *ast.literal_eval(given["install_requires"]),
        *(n for name in extras if name != "dev" for n in extras[name]),
    ]
    return {canonicalize_name(Requirement(text).name): Requirement(text) for text in needed}


def test_everything_that_is_imported_is_declared() -> None:
    imported = set()
    for path in (path for folder in SOURCES.values() for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).partition(".")[0])
    foreign = imported - sys.stdlib_module_names - {"cl_dist"} - UNLOCKED
    assert {"torch", "yaml", "mpi4py"} <= foreign
    owners = packages_distributions()
    missing = {name for name in foreign if not {canonicalize_name(owner) for owner in owners[name]} & declared().keys()}
    assert missing == set()


def test_the_lock_is_inside_the_declared_ranges() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    lines += (ROOT / "requirements-triton.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    assert declared().keys() <= {pin.name for pin in pins} | UNLOCKED
    for pin in pins:
        version = next(iter(pin.specifier)).version
        wanted = declared().get(canonicalize_name(pin.name))
        assert wanted is None or wanted.specifier.contains(version), f"{pin}, setup.py says {wanted}"


def test_the_lock_names_no_registry_and_pins_everything() -> None:
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pin = re.compile(r'[a-z0-9-]+==[\w.!]+(; python_version (<|>=) "3\.\d+")?')
    assert [line for line in lines if not pin.fullmatch(line) and not line.startswith("#")] == []
    assert "torch==2.13.0" in lines


def gpu_pins() -> dict[str, str]:
    """The versions in the lock for GPUs, as the newest supported Python gets them."""
    lines = (ROOT / "requirements-gpu.lock").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if not line.startswith("#")]
    return {pin.name: next(iter(pin.specifier)).version for pin in pins if "<" not in str(pin.marker)}


def test_the_lock_for_gpus_belongs_to_the_same_pytorch() -> None:
    pins = gpu_pins()
    assert f"torch=={pins['torch']}" in (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    assert {"triton", "cuda-toolkit", "nvidia-nccl-cu13", "nvidia-cudnn-cu13"} <= pins.keys()
    assert declared()["triton"].specifier.contains(pins["triton"])
    least = OLDEST_DRIVERS[int(pins["cuda-toolkit"].partition(".")[0])]
    page = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert f"| {pins['torch'].rpartition('.')[0]} (the locked one) | 13.0 | {least} or later |" in page


def test_the_lock_for_gpus_is_made_of_what_only_that_build_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("make_lock", ROOT / "tools" / "make_lock.py")
    assert spec is not None
    assert spec.loader is not None
    make_lock = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_lock)
    found = [("torch", "2.13.0"), ("Jinja2", "3.1.6"), ("nvidia_cublas", "13.1.1.3"), ("triton", "3.7.1")]
    report = {"install": [{"metadata": {"name": name, "version": version}} for name, version in found]}
    monkeypatch.setattr(make_lock, "_report", lambda *_: report)
    assert make_lock.resolve_gpu("python3") == {"torch": "2.13.0", "nvidia-cublas": "13.1.1.3", "triton": "3.7.1"}
    monkeypatch.setattr(make_lock, "_report", lambda *_: {"install": report["install"][:2]})
    with pytest.raises(SystemExit, match=r"serves no build of torch==2\.13\.0 for GPUs"):
        make_lock.resolve_gpu("python3")


@pytest.mark.parametrize("gpu", [True, False])
def test_make_installs_the_lock_for_gpus_if_asked(gpu: bool) -> None:
    command = ["make", "--dry-run", "--always-make", "install", *(["GPU=1"] if gpu else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert ("--requirement requirements-gpu.lock" in done.stdout) is gpu
    assert "--requirement requirements.lock" in done.stdout
    assert f"touch .venv/.installed{'-gpu' * gpu}\n" in done.stdout


def test_this_environment_is_the_locked_one() -> None:
    if Path(sys.prefix).name != ".venv":
        pytest.skip("this is not the environment that the Makefile makes")
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet", "-r", "requirements.lock"]
    done = subprocess.run([*command, "--no-index"], cwd=ROOT, capture_output=True, text=True, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == ""


def test_the_page_has_every_extra() -> None:
    call = next(
        node
        for node in ast.walk(ast.parse((ROOT / "setup.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup"
    )
    extras = next(ast.literal_eval(word.value) for word in call.keywords if word.arg == "extras_require")
    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    table = page.partition("| extra |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(extras)
