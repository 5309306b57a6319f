"""How a process of this project's own is started: with what the user has installed, and nothing that lies about.

`python -m` and `python -c` look for modules in the working folder first, where anybody may have left a `yaml.py`.
Python has a switch against it from 3.11 on (`-P`); what is here does the same on 3.10. PYTHONPATH counts as ever, but
for cl_dist itself: a process runs the same checkout as the one that has started it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import cl_dist

_HOME = str(Path(cl_dist.__file__).absolute().parents[1])

PROGRAM = "cl_dist.cli:program"
"""`cl-dist` itself."""
BOOTSTRAP = (
    "import sys; sys.path[:1] == [''] and sys.path.pop(0); "
    # Its folder is on the path for this one import only: top-level folders of a checkout are named like packages.
    f"sys.path.insert(0, {_HOME!r}); import cl_dist; sys.path.remove({_HOME!r}); "
    "from importlib import import_module; module, _, function = sys.argv.pop(1).partition(':'); "
    "getattr(import_module(module), function)()"
)
"""Calls the function that its first argument names (`module:function`); the others are left in sys.argv."""


def python_command(function: str) -> list[str]:
    """The words that begin a command: this interpreter, calling `function` (`module:function`)."""
    return [sys.executable, "-c", BOOTSTRAP, function]
