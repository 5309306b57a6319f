"""What is done, kept on disk by one rank and known to all of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from cl_dist.state.atomic import write_json, write_text
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder


class Ledger:
    """The manifest, the log and the metrics of a run; on ranks that are not the writer only the manifest in memory.

    Args:
        folder: Run folder.
        manifest: Where the run stands.
        writer: Whether this rank writes files (rank 0).
    """

    def __init__(self, folder: RunFolder, manifest: Manifest, writer: bool) -> None:
        self.folder, self.manifest, self.writer = folder, manifest, writer

    def start(self, recipe_text: str) -> None:
        """Write the resolved recipe and the manifest: from here on the folder holds a run."""
        if self.writer:
            if self.folder.manifest.exists():
                # Before the recipe, whose split may be new: only the manifest's segments say for sure what the global
                # batch is.
                self.manifest.write(self.folder.manifest)
            write_text(self.folder.config, recipe_text)
        self.update()

    def update(self, **changes: Any) -> None:
        """Change fields of the manifest; call on all ranks alike."""
        self.replace(dataclasses.replace(self.manifest, **changes))

    def replace(self, manifest: Manifest) -> None:
        """Let this be the manifest from now on; call on all ranks alike."""
        self.manifest = manifest
        if self.writer:
            self.manifest.write(self.folder.manifest)

    def log(self, **record: Any) -> None:
        """Append one line to log.jsonl."""
        if self.writer:
            self.folder.append_log(record)

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json."""
        if self.writer:
            write_json(self.folder.metrics, metrics)
