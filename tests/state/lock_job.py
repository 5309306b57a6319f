"""Run by test_lock.py: takes a run's lock, reports it, and holds it until its standard input ends."""

from __future__ import annotations

import sys
from pathlib import Path

from cl_dist.errors import BadInput
from cl_dist.state.lock import RunLock


def main(path: Path) -> None:
    try:
        with RunLock(path):
            print("held", flush=True)
            sys.stdin.read()
    except BadInput as error:
        print(error, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
