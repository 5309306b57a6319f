"""`python -m cl_dist` is `cl-dist`, for launchers that start Python themselves (`torchrun -m cl_dist`)."""

from __future__ import annotations

import sys
from pathlib import Path

# Python has put the working folder first on the import path, where anybody may have left a `yaml.py`. It goes, unless
# the package itself was found there; what PYTHONPATH says stays.
_WITHOUT_IT = getattr(sys.flags, "safe_path", False) or sys.flags.isolated
if __name__ == "__main__" and not _WITHOUT_IT and Path(sys.path[0]) != Path(__file__).parents[1]:
    del sys.path[0]

from cl_dist.cli import program  # noqa: E402

if __name__ == "__main__":
    program()
