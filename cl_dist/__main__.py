"""`python -m cl_dist` is `cl-dist`; the launcher starts ranks by it."""

from __future__ import annotations

from cl_dist.cli import program

if __name__ == "__main__":
    program()
