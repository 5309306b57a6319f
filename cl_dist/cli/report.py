"""`cl-dist report`: writes the report of a run, or of several side by side."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from cl_dist.cli.parser import Help
from cl_dist.output import terminal_columns
from cl_dist.progress import format_matrix, waiting
from cl_dist.report import FORMATS

_DESCRIPTION = """\
Write index.html, one page that needs no network, with the scores of a run, what was forgotten and how it was trained;
beside it the same as report.md, with pictures and data. The run may still be going on. With several runs, the page
shows them side by side. docs/report.md explains how to read it.
"""
_EPILOG = """\
examples:
  cl-dist report runs/mine                        runs/mine/report/index.html
  cl-dist report runs/plain runs/migu             side by side, in runs/report
  cl-dist report runs/mine --figures png,svg,pdf  every picture for a paper too
"""


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `report`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "report",
        parents=[common],
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=Help,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        help="where to write it (default: RUN/report; with several runs `report` in the folder that they are all in)",
    )
    add_figures(parser)
    parser.set_defaults(command=report, works=lambda parsed: True)


def add_figures(parser: ArgumentParser) -> None:
    """Add `--figures`."""
    parser.add_argument(
        "--figures",
        metavar="png,svg,pdf",
        type=formats,
        default=("png",),
        help="formats of the pictures; PNG is always written (default: png)",
    )


def formats(text: str) -> tuple[str, ...]:
    """Parse `--figures png,pdf`."""
    names = tuple(name.strip().lower() for name in text.split(","))
    for name in names:
        if name not in FORMATS:
            raise ArgumentTypeError(f'"{name}" is not a format of pictures; allowed: {", ".join(FORMATS)}')
    return names


def report(arguments: Namespace) -> int:
    """Write the report; print the scores, what is missing, and the files."""
    from cl_dist.report.write import write_report, write_several

    runs = [Path(run) for run in arguments.runs]
    if len(runs) > 1:
        with waiting("drawing the report"):
            written = write_several(runs, arguments.out, arguments.figures)
        print(f"wrote {written}")
        return 0
    with waiting("drawing the report"):
        done = write_report(runs[0], arguments.out, arguments.figures)
    manifest = done.run.manifest
    if manifest.accuracy_matrix:
        print(format_matrix(manifest.tasks, manifest.accuracy_matrix, terminal_columns()) + "\n")
    for text in done.missing:
        print(text)
    page, *others = done.files
    for name in (*others, page):  # the page last, where it is seen
        print(f"wrote {done.folder / name}")
    return 0
