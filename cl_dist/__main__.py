"""`python -m cl_dist` is `cl-dist`; the launcher starts ranks by it."""

from __future__ import annotations

import sys

from cl_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
