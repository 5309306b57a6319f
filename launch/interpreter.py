"""How a process of this project's own is started: with what the user has installed, and nothing that lies about.

`python -m` and `python -c` look for modules in the working folder first, where anybody may have left a `yaml.py`.
Python has a switch against it from 3.11 on (`-P`); what is here does the same on 3.10. PYTHONPATH counts as ever.
"""

from __future__ import annotations

import sys

PROGRAM = "cl_dist.cli:program"
"""`cl-dist` itself."""
BOOTSTRAP = (
    "import sys; sys.path[:1] == [''] and sys.path.pop(0); from importlib import import_module; "
    "module, _, function = sys.argv.pop(1).partition(':'); getattr(import_module(module), function)()"
)
"""Calls the function that its first argument names (`module:function`); the others are left in sys.argv."""


def python_command(function: str) -> list[str]:
    """The words that begin a command: this interpreter, calling `function` (`module:function`)."""
    return [sys.executable, "-c", BOOTSTRAP, function]
