"""Run by test_atomic.py in its own mount namespace: calls every writer on a full disk and prints the errors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from cl_dist.errors import ClDistError
from cl_dist.state.atomic import append_line, publishing, recover, write_json
from cl_dist.state.spans import Span, SpanReader, write_spans

BIG = 100_000


def store(folder: Path, size: int) -> None:
    with publishing(folder) as temporary:
        write_spans(temporary, 0, {"master": {"w": Span(0, torch.ones(size))}})


def copy(folder: Path) -> None:
    with publishing(folder) as temporary:
        (temporary / "plain").write_bytes(bytes(4 * BIG))


def main(disk: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], check=True)
    store(disk / "state", 10)
    write_json(disk / "manifest.json", {"completed": 1})
    attempts = {
        "spans": lambda: store(disk / "state", BIG),
        "folder": lambda: copy(disk / "state"),
        "json": lambda: write_json(disk / "manifest.json", {"completed": 2, "padding": "x" * 4 * BIG}),
        "log": lambda: append_line(disk / "log.jsonl", {"padding": "x" * 4 * BIG}),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            print(name, "was written")
        except ClDistError as error:
            print(name, error)
    recover(disk)
    print("state", SpanReader(disk / "state", ranks=1).read("master", "w", 0, 10).sum().item())
    print("manifest", (disk / "manifest.json").read_text().split())
    print("left", sorted(path.name for path in disk.iterdir()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
