"""`import cl_dist` has the public names, and pays only for those that are used."""

from __future__ import annotations

import subprocess
import sys

import pytest

import cl_dist

SCRIPT = """
import sys
import cl_dist
assert {"run", "load_run", "Recipe", "shards"} <= set(dir(cl_dist))
loaded = [name for name in sys.modules if name.startswith("cl_dist.")]
assert not loaded, loaded
recipe = cl_dist.Recipe.load("quickstart", method="migu")
cl_dist.load_run, cl_dist.run
frameworks = {"torch", "transformers", "deepspeed", "datasets", "pandas", "matplotlib"}
heavy = frameworks & set(sys.modules)
assert not heavy, heavy
"""


def test_nothing_is_imported_before_it_is_used() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_name_of_the_table_exists() -> None:
    for name, module in cl_dist._NAMES.items():
        assert getattr(cl_dist, name).__module__ == module
    with pytest.raises(AttributeError, match="module 'cl_dist' has no attribute 'lode_run'"):
        _ = cl_dist.lode_run  # type: ignore[attr-defined]
