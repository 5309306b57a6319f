"""Writes requirements.lock: an exact version of every package, for each supported generation of Python, and
requirements-gpu.lock: what PyPI's build of PyTorch for GPUs needs in addition.

Usage: make_lock.py OLDEST CURRENT (two interpreters, such as `python3.10 python3.11`). Each one resolves the
requirements of setup.py without installing them; if they disagree, the lock has both versions with a marker. PyTorch's
release is fixed here, because another one may be a build for other hardware. Its own dependencies (CUDA libraries,
Triton) are in the second lock only, since each build of PyTorch pins them itself. pip reads their metadata without
downloading them; only PyTorch's wheel may be fetched.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ["torch==2.13.0", "setuptools", "wheel", f"{ROOT}[dev,docs,general,mpi,tensorboard,trl]"]
OF_THE_TORCH_BUILD = re.compile(r"(nvidia|cuda)-|triton$|cl-dist$")
HEADER = "# Exact versions of everything that cl_dist and its tests use. Made by `make lock`; do not edit.\n"
PYPI = "https://pypi.org/simple"
GPU_HEADER = (
    "# What PyPI's build of PyTorch for NVIDIA's GPUs needs in addition to requirements.lock, with the build itself.\n"
    "# Made by `make lock`; do not edit.\n"
)

Pins = dict[str, str]


def resolve(python: str) -> Pins:
    """Versions by normalised package name, as resolved by `python`'s pip on this machine."""
    found = versions(_report(python, ROOTS, dict(os.environ)))
    return {name: version for name, version in found.items() if not OF_THE_TORCH_BUILD.match(name)}


def resolve_gpu(python: str) -> Pins:
    """The same for PyTorch's build for GPUs and what only that build needs, from PyPI alone: this machine's settings of
    pip may name a build for CPUs.
    """
    torch = next(root for root in ROOTS if root.startswith("torch=="))
    hidden = {name: value for name, value in os.environ.items() if not name.startswith("PIP_") or name == "PIP_CERT"}
    found = versions(_report(python, ["--index-url", PYPI, torch], {**hidden, "PIP_CONFIG_FILE": os.devnull}))
    chosen = {name: version for name, version in found.items() if OF_THE_TORCH_BUILD.match(name) or name == "torch"}
    if len(chosen) < 2:
        sys.exit(f"{PYPI} serves no build of {torch} for GPUs")
    return chosen


def _report(python: str, requirements: list[str], environment: dict[str, str]) -> Any:
    """Pip's report on an installation of `requirements` in an empty environment, which does not take place."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
        report = Path(folder, "report.json")
        options = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
        subprocess.run([*pip, "install", *options, *requirements], check=True, env=environment)
        return json.loads(report.read_text(encoding="utf-8"))


def versions(report: dict[str, list[dict[str, dict[str, str]]]]) -> Pins:
    """The versions in pip's installation report, without local labels such as +cpu, so that any build matches."""
    entries = [entry["metadata"] for entry in report["install"]]
    return {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"].split("+")[0] for entry in entries}


def python_version(python: str) -> str:
    """The version of an interpreter, such as 3.11."""
    command = [python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def lock(old: Pins, new: Pins, boundary: str) -> list[str]:
    """The lines of the lock; `old` applies to Python versions before `boundary`, `new` from there on."""
    lines = []
    # Packages that only one of the interpreters needs get a marker too.
    for name in sorted({*old, *new}):
        if old.get(name) == new.get(name):
            lines.append(f"{name}=={new[name]}")
            continue
        if name in old:
            lines.append(f'{name}=={old[name]}; python_version < "{boundary}"')
        if name in new:
            lines.append(f'{name}=={new[name]}; python_version >= "{boundary}"')
    return lines


def main(oldest: str, current: str) -> None:
    """Resolve for both interpreters, and write the lock."""
    boundary = python_version(current)
    for name, header, resolver in (
        ("requirements.lock", HEADER, resolve),
        ("requirements-gpu.lock", GPU_HEADER, resolve_gpu),
    ):
        lines = lock(resolver(oldest), resolver(current), boundary)
        (ROOT / name).write_text(header + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
