"""`cl-dist report`: tables and pictures of a run, finished or not."""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from cl_dist.progress import format_matrix


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `report`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser("report", parents=[common], help="tables and pictures of a run, finished or not")
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where to write (default: RUN/report)")
    parser.set_defaults(command=report, works=lambda parsed: True)


def report(arguments: Namespace) -> int:
    """Write the report; print the scores, what is missing and what was written."""
    from cl_dist.report.write import write_report

    done = write_report(Path(arguments.run), arguments.out)
    manifest = done.run.manifest
    if manifest.accuracy_matrix:
        print(format_matrix(manifest.tasks, manifest.accuracy_matrix) + "\n")
    for text in done.missing:
        print(text)
    for name in done.files:
        print(f"wrote {done.folder / name}")
    return 0
