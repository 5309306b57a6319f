"""What is done, kept on disk by one rank and known to all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from cl_dist.errors import ClDistError
from cl_dist.state.atomic import write_json, write_text
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from cl_dist.state.scores import How, TaskScored
from cl_dist.state.together import together


class Ledger:
    """The manifest, the log and the metrics of a run; on ranks that are not the writer only the manifest in memory.

    What the writer fails to write, on a full disk say, all ranks raise: at once where they come here together, and for
    the lines that are written in between (`append`) the next time they do.

    Args:
        folder: Run folder.
        manifest: Where the run stands.
        writer: Whether this rank writes files (rank 0).
    """

    def __init__(self, folder: RunFolder, manifest: Manifest, writer: bool) -> None:
        self.folder, self.manifest, self.writer = folder, manifest, writer
        self._failure: ClDistError | None = None

    def start(self, recipe_text: str) -> None:
        """Write the resolved recipe and the manifest: from here on the folder holds a run (collective)."""
        self.write(lambda: self._start(recipe_text))
        self.update()

    def _start(self, recipe_text: str) -> None:
        if self.folder.manifest.exists():
            # Before the recipe, whose split may be new: only the manifest's segments say for sure what the global batch
            # is.
            self.manifest = self.manifest.write(self.folder.manifest)
        write_text(self.folder.config, recipe_text)

    def update(self, **changes: Any) -> None:
        """Change fields of the manifest (collective)."""
        self.replace(dataclasses.replace(self.manifest, **changes))

    def replace(self, manifest: Manifest) -> None:
        """Let this be the manifest from now on (collective)."""
        stored = [manifest]

        def write() -> None:
            stored[0] = manifest.write(self.folder.manifest)

        self.write(write)
        self.manifest = stored[0]  # not before it is on the disk: `note_failure` goes by it

    def scored(self, task: int, score: float, how: How | None = None) -> None:
        """Add the score of the task at position `task`, and how it came about, to the row under way: one line of a file
        (collective).
        """
        scored = TaskScored(task, score, how or {})
        manifest = self.manifest.with_score(scored)
        self.write(lambda: manifest.append_score(self.folder.manifest, scored))
        self.manifest = manifest

    def note_failure(self) -> None:
        """Let the manifest on the disk say that the run has failed; the other ranks need not come here."""
        if self.writer:
            dataclasses.replace(self.manifest, status="failed").write(self.folder.manifest)

    def write(self, work: Callable[[], None]) -> None:
        """Let the writer write something (collective)."""
        together(lambda: self._write(work))

    def _write(self, work: Callable[[], None]) -> None:
        if self._failure is not None:
            raise self._failure
        if self.writer:
            work()

    def append(self, work: Callable[[], None]) -> None:
        """Let the writer append a line; it does so alone."""
        if self.writer and self._failure is None:
            try:
                work()
            except ClDistError as error:
                self._failure = error

    @property
    def failed(self) -> bool:
        """Whether a line of this rank's is still to be told of as failed (`settle`)."""
        return self._failure is not None

    def settle(self) -> None:
        """Raise on all ranks what `append` has failed with on one (collective)."""
        self.write(lambda: None)

    def log(self, **record: Any) -> None:
        """Append one line to log.jsonl."""
        self.append(lambda: self.folder.append_log(record))

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json (collective)."""
        self.write(lambda: write_json(self.folder.metrics, metrics))
