"""Open MPI in tests: whether it is here, and its command line."""

from __future__ import annotations

import shutil
import subprocess
from importlib.util import find_spec

MPIRUN = ("mpirun", "--allow-run-as-root", "--oversubscribe")


def missing() -> str | None:
    """Why ranks cannot be started by MPI here; None where they can."""
    if shutil.which("mpirun") is None:
        return "mpirun is not installed (tests/slurm/install.sh installs it)"
    version = subprocess.run(["mpirun", "--version"], capture_output=True, text=True, check=False).stdout
    if "Open MPI" not in version:
        return "mpirun is not Open MPI's"
    return "mpi4py is not installed" if find_spec("mpi4py") is None else None
