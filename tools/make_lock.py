"""Writes requirements.lock: an exact version of every package, for each supported generation of Python.

Usage: make_lock.py OLDEST CURRENT (two interpreters, such as `python3.10 python3.11`). Each one resolves the
requirements of setup.py without installing them; if they disagree, the lock has both versions with a marker. PyTorch's
release is fixed here, because another one may be a build for other hardware. Its own dependencies (CUDA libraries,
Triton) are left out, since each build of PyTorch pins them itself.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ROOTS = ["torch==2.13.0", "setuptools", "wheel", f"{ROOT}[dev,general,mpi]"]
OF_THE_TORCH_BUILD = re.compile(r"(nvidia|cuda)-|triton$|cl-dist$")
HEADER = "# Exact versions of everything that cl_dist and its tests use. Made by `make lock`; do not edit.\n"

Pins = dict[str, str]


def resolve(python: str) -> Pins:
    """Versions by normalised package name, as resolved by `python`'s pip on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([python, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", "--upgrade", "pip"], check=True)
        report = Path(folder, "report.json")
        options = ["--dry-run", "--ignore-installed", "--quiet", "--report", str(report)]
        subprocess.run([*pip, "install", *options, *ROOTS], check=True)
        return pins(json.loads(report.read_text(encoding="utf-8")))


def pins(report: dict[str, list[dict[str, dict[str, str]]]]) -> Pins:
    """The pins in pip's installation report, without local labels such as +cpu, so that any build matches."""
    entries = [entry["metadata"] for entry in report["install"]]
    named = {re.sub(r"[-_.]+", "-", entry["name"]).lower(): entry["version"].split("+")[0] for entry in entries}
    return {name: version for name, version in named.items() if not OF_THE_TORCH_BUILD.match(name)}


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
    lines = lock(resolve(oldest), resolve(current), python_version(current))
    (ROOT / "requirements.lock").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
