"""`python -m cl_dist.benchmarks.gpu --out DIR`: the same as `cl-dist bench gpu`, from a checkout that is not installed.

It starts with nothing but Python; a package that is missing costs only the parts that need it.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser

from cl_dist.benchmarks.gpu.day import add_options, run
from cl_dist.errors import ClDistError

if __name__ == "__main__":
    parser = ArgumentParser(prog="python -m cl_dist.benchmarks.gpu")
    add_options(parser)
    try:
        sys.exit(run(parser.parse_args()))
    except ClDistError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
