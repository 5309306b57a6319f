"""The recipes for containers agree with the lock files, with each other and with what is in the repository.

They are not built here; what can be checked without building is.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (ROOT / "containers" / "cl_dist.def").read_text(encoding="utf-8")
DIRECTIVES = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "ENTRYPOINT", "CMD"}
HEADERS = {"bootstrap", "from"}
SECTIONS = {"%files", "%post", "%environment", "%runscript", "%test"}


def docker_steps() -> list[tuple[str, str]]:
    """Directive and rest of each instruction, continued lines joined."""
    joined = re.sub(r"\\\n\s*", "", DOCKERFILE)
    lines = [line for line in joined.splitlines() if line and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def sections() -> dict[str, str]:
    """Text of each section of the definition; its header under the empty name."""
    parts = re.split(r"^(%\w+)\n", DEFINITION, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def commands(shell: str) -> list[str]:
    return [line.strip() for line in re.split(r"\n|&&", shell) if line.strip() and not line.strip().startswith("#")]


RUNS = [line for directive, rest in docker_steps() if directive == "RUN" for line in commands(rest)]
POST = commands(sections()["%post"])


def test_both_are_made_of_known_parts() -> None:
    assert {directive for directive, _ in docker_steps()} == DIRECTIVES
    assert docker_steps()[0][0] == "FROM"
    assert sections().keys() - {""} == SECTIONS
    header = dict(line.split(": ") for line in sections()[""].splitlines() if not line.startswith("#") and line)
    assert {name.lower() for name in header} == HEADERS
    assert header["Bootstrap"] == "docker"


def test_both_start_from_a_python_that_the_locks_support() -> None:
    images = {dict(docker_steps())["FROM"], re.findall(r"^From: (.+)$", DEFINITION, re.MULTILINE)[0]}
    assert len(images) == 1
    version = re.fullmatch(r"python:(\d+\.\d+)-slim-bookworm", images.pop())
    assert version is not None
    supported = re.findall(r"^LOCK_PYTHONS \?= (.+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert f"python{version[1]}" in supported[0].split()


def test_both_install_the_locked_versions_and_nothing_else() -> None:
    installed = [line for line in RUNS if line.startswith("pip ")]
    assert installed == [line for line in POST if line.startswith("pip ")]
    locks = [word for word in shlex.split(installed[0]) if word.endswith(".lock")]
    assert locks == ["requirements-gpu.lock", "requirements.lock"]
    assert all((ROOT / lock).is_file() for lock in locks)
    for line in installed:
        assert re.search(r"==|https?:|--(extra-)?index-url", line) is None
    page = " ".join((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split())
    assert f"pip install {' '.join(f'--requirement {lock}' for lock in locks)}" in page
    assert {line for line in RUNS if line.startswith("apt-get install")} == {
        line for line in POST if line.startswith("apt-get install")
    }


def test_both_copy_everything_that_is_installed() -> None:
    copied = {word for step, rest in docker_steps() if step == "COPY" for word in rest.split()[:-1]}
    files = [line.split() for line in commands(sections()["%files"])]
    assert copied == {source for source, _ in files}
    assert all(target == f"/opt/cl_dist/{source}" for source, target in files)
    assert all((ROOT / name).exists() for name in copied)
    linked = {path.name for path in (ROOT / "cl_dist").iterdir() if path.is_symlink()}
    assert {"cl_dist", "setup.py", "pyproject.toml", "README.md", "requirements.lock", *linked} <= copied
    # What is installed without isolation has to be locked.
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert re.search(r"^setuptools==", lock, re.MULTILINE)


@pytest.mark.parametrize(
    "shell", [" && ".join(RUNS), *(t for name, t in sections().items() if name not in ("", "%files"))]
)
def test_their_commands_are_shell(shell: str) -> None:
    done = subprocess.run(["sh", "-n"], input=shell, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
