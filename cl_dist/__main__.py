"""`python -m cl_dist` is `cl-dist`, for launchers that start Python themselves (`torchrun -m cl_dist`)."""

from __future__ import annotations

import os
import sys

# Python has put the working folder first on the import path, where anyone may have left a `yaml.py`. Remove it, unless
# the package itself was found there; PYTHONPATH stays. Until then, import only modules that Python itself has loaded.
_HOME = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_WITHOUT_IT = getattr(sys.flags, "safe_path", False) or sys.flags.isolated
if __name__ == "__main__" and not _WITHOUT_IT and sys.path[0] != _HOME:
    del sys.path[0]

from cl_dist.cli import program  # noqa: E402

if __name__ == "__main__":
    program()
