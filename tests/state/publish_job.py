"""Run by test_atomic.py until it is killed: replaces one folder and one file over and over."""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

from cl_dist.state.atomic import publishing, recover, write_json

FILES = 4


def main(root: Path) -> None:
    recover(root)
    for version in count():
        with publishing(root / "checkpoint") as temporary:
            for number in range(FILES):
                (temporary / f"part-{number}").write_text(f"{version} " * 500)
        write_json(root / "manifest.json", {"version": version, "padding": [version] * 500})
        print(version, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
