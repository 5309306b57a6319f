"""Writes the report of a run folder."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.progress import WIDEST_MATRIX
from cl_dist.report import pictures, tables
from cl_dist.report.drawing import Picture
from cl_dist.report.flips import Flips, flips_csv, read_flips
from cl_dist.report.html import render
from cl_dist.report.kept_rows import (
    KeptRows,
    kept_rows_csv,
    kept_rows_picture,
    read_kept_rows,
    row_overlap_csv,
    row_overlap_picture,
)
from cl_dist.report.page import MATRIX_FILE, Page
from cl_dist.report.reading import RunData, read_run
from cl_dist.report.sections import Contents, kinds, run_page
from cl_dist.report.several import default_folder, read_several, several_page, several_pictures
from cl_dist.report.units import UnitResults, correlation, read_unit_results
from cl_dist.state.atomic import advising, write_bytes
from cl_dist.state.run_folder import RunFolder

PAGE, HTML = "report.md", "index.html"
"""The pages: for a terminal or a repository, and for a browser."""
MARK, MOST_BEFORE_THE_MARK = b'<meta name="generator" content="cl-dist report">', 2000
"""What shows that a page is from a report, and how far from its beginning at most, in bytes."""
MOST_NAMED = 25
"""Tasks that are listed in a sentence."""
_ELSEWHERE = "use --out DIR to write it elsewhere"


@dataclass(frozen=True)
class Report:
    """A report that was written."""

    run: RunData
    folder: Path
    files: tuple[str, ...]
    """Names of the files, the pages first."""
    missing: tuple[str, ...]
    """What is not shown, and why."""


def write_report(run_folder: Path, out: Path | None = None, formats: Collection[str] = ("png",)) -> Report:
    """Write the report of a run into `out`, by default into `report` in the run folder: a page of HTML that contains
    everything, a page of Markdown with its pictures, and data. `formats` (of `FORMATS`) are those of the pictures; PNG,
    which the Markdown page shows, is always written.

    All data is read and all pictures are drawn before the first file is written; each file is replaced atomically.

    Raises:
        BadInput: `run_folder` contains no run, one of its files is damaged, or `out` cannot be written.
        ClDistError: The disk is full.
    """
    run = read_run(run_folder)
    # Read and draw everything first: an error must not leave half of a report behind.
    folders = [run.folder.task(position, name) for position, name in enumerate(run.done)]
    units = read_unit_results(folders)
    flips, not_compared = read_flips(run)
    kept = read_kept_rows(run.done, folders)
    own = out is None
    out = run.folder.report if out is None else out
    check_out(out)
    files, vectors = rendered(chain(_files(run, units), _sample_files(flips), _row_files(kept)), formats)
    missing = tuple(_missing(run, units))
    page = Page(run, units, files, missing).render(out)
    html = render(run_page(Contents(run, units, flips, not_compared, kept, [PAGE, *files], missing)), vectors)
    everything = {HTML: html.encode(), PAGE: page.encode(), **files}
    if not own:  # what is in the run's own folder of reports may be from a release that wrote no HTML
        check_foreign(out, everything)
    write_files(out, everything)
    return Report(run, out, (HTML, PAGE, *files), missing)


def write_several(folders: Sequence[Path], out: Path | None = None, formats: Collection[str] = ("png",)) -> Path:
    """Write a page that shows several runs side by side, and return its path; otherwise like `write_report`. By
    default it is in `report` in the folder that all runs are in.

    Raises:
        BadInput: A folder contains no run, is given twice, or one of its files is damaged; or `out` cannot be written.
        ClDistError: The disk is full.
    """
    several = read_several(folders)
    out = default_folder(folders) if out is None else out
    check_out(out)
    files, vectors = rendered(several_pictures(several), formats)
    everything = {HTML: render(several_page(several, list(files)), vectors).encode(), **files}
    check_foreign(out, everything)
    write_files(out, everything)
    return out / HTML


def rendered(
    files: Iterable[tuple[str, bytes | Picture]], formats: Collection[str]
) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files, with the pictures (`name.png`) in `formats`; and the pictures as SVG, by name, to put into a page."""
    written, vectors = {}, {}
    for file, content in files:
        if isinstance(content, bytes):
            written[file] = content
            continue
        name = file.removesuffix(".png")
        images = content.render({"png", "svg", *formats})
        vectors[name] = images["svg"]
        written |= {f"{name}.{kind}": image for kind, image in images.items() if kind == "png" or kind in formats}
    return written, vectors


def _files(run: RunData, units: UnitResults | None) -> Iterator[tuple[str, bytes | Picture]]:
    """The pictures and CSV files that the run has data for."""
    tasks, matrix = run.manifest.tasks, run.manifest.accuracy_matrix
    if matrix:
        yield "accuracy_matrix.png", pictures.accuracy_matrix(tasks, matrix, kinds(run))
        yield "scores.png", pictures.scores(tasks, matrix, kinds(run))
        if len(tasks) > WIDEST_MATRIX:
            yield MATRIX_FILE, tables.matrix_csv(tasks, matrix).encode()
    if run.log.losses:
        yield "loss.png", pictures.loss(tasks, run.log.losses)
    if run.manifest.general:
        yield "general.csv", tables.general_csv(run.manifest.general).encode()
    if units is not None:
        yield from _unit_files(run.done, units)


def _unit_files(tasks: tuple[str, ...], units: UnitResults) -> Iterator[tuple[str, bytes | Picture]]:
    yield "unit_importance.png", pictures.unit_importance(tasks, units)
    yield "unit_importance.csv", tables.importance_csv(tasks, units).encode()
    yield "fusion.csv", tables.fusion_csv(tasks, units).encode()
    if len(tasks) > 1:
        correlations = correlation(units.importance)
        yield "task_correlation.png", pictures.task_correlation(tasks, correlations)
        yield "task_correlation.csv", tables.correlation_csv(tasks, correlations).encode()
        yield "fusion.png", pictures.fusion(tasks, units)


def _sample_files(flips: Sequence[Flips]) -> Iterator[tuple[str, bytes | Picture]]:
    if flips:
        yield "samples.csv", flips_csv(flips).encode()


def _row_files(kept: KeptRows | None) -> Iterator[tuple[str, bytes | Picture]]:
    if kept is None or not any(kept.masked):
        return
    yield "kept_rows.png", kept_rows_picture(kept)
    yield "kept_rows.csv", kept_rows_csv(kept).encode()
    if sum(kept.masked) > 1:
        yield "row_overlap.png", row_overlap_picture(kept)
        yield "row_overlap.csv", row_overlap_csv(kept).encode()


def _missing(run: RunData, units: UnitResults | None) -> Iterator[str]:
    left = run.manifest.tasks[len(run.done) :]
    if left:
        yield f"The run is not finished: no results yet for {listed(left, MOST_NAMED)}."
    if not run.manifest.accuracy_matrix:
        yield "No scores: the untouched model has not been evaluated yet."
    if not run.log.losses:
        yield f"No training loss: {run.folder.log.name} is missing or has no steps."
    if run.log.unreadable:
        count = run.log.unreadable
        lines = "1 line" if count == 1 else f"{count} lines"
        yield f"{lines} of {run.folder.log.name} cannot be read and {'is' if count == 1 else 'are'} skipped."
    if not run.settings:
        yield f"No settings: {run.folder.config.name} is missing."
    if units is not None and len(run.done) == 1:
        yield "No correlation and no picture of fusion: both need two finished tasks."


def check_out(out: Path) -> None:
    """Create the folder; BadInput if that fails, if files cannot be written there, or if it is the folder of a run."""
    if RunFolder(out).manifest.exists():
        raise BadInput(f"{out} is a run folder; give another folder for the report with --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInput(f"{out}: cannot create the folder of the report: {error.strerror}; {_ELSEWHERE}") from error
    try:
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise BadInput(f"{out}: the report cannot be written there: {error.strerror}; {_ELSEWHERE}") from error


def check_foreign(out: Path, names: Iterable[str]) -> None:
    """Raise `BadInput` if the folder has files of these names that are not from a report."""
    page = out / HTML
    try:
        ours = page.is_file() and MARK in page.read_bytes()[:MOST_BEFORE_THE_MARK]
    except OSError as error:
        raise BadInput(f"{page} cannot be read: {error.strerror}; {_ELSEWHERE}") from error
    if not ours and (there := sorted(name for name in names if (out / name).exists())):
        raise BadInput(f"{out} has files that no report wrote ({listed(there, 3)}); {_ELSEWHERE}")


def write_files(out: Path, files: Mapping[str, bytes]) -> None:
    """Write the files by name, replacing each atomically; `BadInput` if that fails."""
    try:
        with advising(f"free some space and try again; {_ELSEWHERE}"):
            for name, content in files.items():
                write_bytes(out / name, content)
    except OSError as error:
        raise BadInput(f"{out}: the report cannot be written there: {error.strerror}; {_ELSEWHERE}") from error
