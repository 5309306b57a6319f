"""The progress of a run: known to all ranks, written to disk by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cl_dist.errors import ClDistError
from cl_dist.state.atomic import LineFile, write_json, write_text
from cl_dist.state.collective_failure import fail_together
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.scores import How, TaskScored


class Ledger:
    """The manifest, log and metrics of a run. All ranks have the manifest in memory; only the writer writes files.

    If the writer fails, because the disk is full for example, all ranks raise its error: immediately in a collective
    method, and at the next collective call after `append`, which the writer does alone.

    Args:
        folder: Run folder.
        manifest: How far the run has come.
        writer: Whether this rank writes the files (rank 0).
    """

    def __init__(self, folder: RunFolder, manifest: Manifest, writer: bool) -> None:
        self.folder, self.manifest, self.writer = folder, manifest, writer
        self._log = LineFile(folder.log)
        self._failure: ClDistError | None = None

    def start(self, recipe_text: str) -> None:
        """Write the resolved recipe and the manifest, which make the folder a run folder (collective)."""

        def write() -> None:
            # On resume the manifest goes first, because the recipe may have a new split of the global batch: after a
            # kill between the two, only the segments in the manifest can be trusted.
            if self.folder.manifest.exists():
                self.manifest = self.manifest.write(self.folder.manifest)
            write_text(self.folder.config, recipe_text)

        self.write(write)
        self.update()

    def update(self, **changes: Any) -> None:
        """Change fields of the manifest (collective)."""
        self.replace(dataclasses.replace(self.manifest, **changes))

    def replace(self, manifest: Manifest) -> None:
        """Write `manifest` and use it from now on (collective)."""
        stored = [manifest]

        def write() -> None:
            stored[0] = manifest.write(self.folder.manifest)

        self.write(write)
        self.manifest = stored[0]  # only once it is on disk, since `note_failure` writes this one

    def scored(self, task: int, score: float, how: How | None = None) -> None:
        """Add the score of the task at position `task`, and how it was obtained, to the current row (collective).

        Appends one line to the file of scores; the manifest is not rewritten.
        """
        scored = TaskScored(task, score, how or {})
        manifest = self.manifest.with_score(scored)
        self.write(lambda: manifest.append_score(self.folder.manifest, scored))
        self.manifest = manifest

    def note_failure(self) -> None:
        """Mark the run as failed in the manifest on disk. Not collective."""
        if self.writer:
            dataclasses.replace(self.manifest, status="failed").write(self.folder.manifest)

    def write(self, work: Callable[[], None]) -> None:
        """Do `work` on the writer (collective)."""
        fail_together(lambda: self._write(work))

    def _write(self, work: Callable[[], None]) -> None:
        if self._failure is not None:
            raise self._failure
        if self.writer:
            work()

    def append(self, work: Callable[[], None]) -> None:
        """Do `work`, which appends a line, on the writer. Not collective: `settle` raises its failure on all ranks."""
        if self.writer and self._failure is None:
            try:
                work()
            except ClDistError as error:
                self._failure = error

    @property
    def failed(self) -> bool:
        """Whether an `append` has failed on this rank and `settle` has not raised the error yet."""
        return self._failure is not None

    def settle(self) -> None:
        """Raise on all ranks the error that `append` met on the writer (collective)."""
        self.write(lambda: None)

    def log(self, **record: Any) -> None:
        """Append one line to log.jsonl."""
        self.append(lambda: self._log.append(record))

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json (collective)."""
        self.write(lambda: write_json(self.folder.metrics, metrics))
