"""The layout of a sweep's folder.

| place | content |
|---|---|
| `compare.yaml` | the recipe that all cells share, as resolved by the first call |
| `recipes/<order>-<method>-seed<k>.yaml` | the resolved recipe that a cell runs |
| `runs/<order>/<method>/seed<k>/` | the run folder of a cell |
| `table.md`, `table.csv`, `table.tex` | the results so far |
| `report/` | the page and pictures of the results |
| `.lock` | held while cells run here |
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cl_dist.errors import BadInput
from cl_dist.state.atomic import make_folder, write_text

TABLES = ("table.md", "table.csv", "table.tex")
_SEED = re.compile(r"seed(\d+)")


@dataclass(frozen=True)
class SweepFolder:
    """Paths in a sweep's folder."""

    path: Path

    @property
    def base(self) -> Path:
        """The recipe that all cells share."""
        return self.path / "compare.yaml"

    @property
    def lock(self) -> Path:
        """Lock file (`cl_dist.state.lock.RunLock`)."""
        return self.path / ".lock"

    @property
    def runs(self) -> Path:
        """Folder of all run folders."""
        return self.path / "runs"

    @property
    def report(self) -> Path:
        """Folder of the page and its pictures."""
        return self.path / "report"

    def run(self, order: str, method: str, seed: int) -> Path:
        """Run folder of a cell."""
        return self.runs / order / method / f"seed{seed}"

    def recipe(self, order: str, method: str, seed: int) -> Path:
        """Resolved recipe of a cell."""
        return self.path / "recipes" / f"{order}-{method}-seed{seed}.yaml"

    def found(self) -> Iterator[tuple[str, str, int]]:
        """Order, method and seed of every existing run folder, sorted."""
        for path in sorted(self.runs.glob("*/*/seed*")):
            match = _SEED.fullmatch(path.name)
            if match is not None and (path / "manifest.json").exists():
                yield path.parent.parent.name, path.parent.name, int(match[1])

    def require_own(self) -> None:
        """Raise `BadInput` if the path is a file, or a folder with anything but a sweep."""
        if self.path.exists() and not self.path.is_dir():
            raise BadInput(f"--out {self.path} is a file; give a folder or a path that does not exist")
        if self.base.exists() or not self.path.exists():
            return
        names = sorted(path.name for path in self.path.iterdir() if path not in (self.lock, self.runs))
        if names:
            raise BadInput(
                f"--out {self.path} contains {names[0]} but no {self.base.name}, so it is not a folder of "
                "cl-dist compare: choose a path that does not exist, or an empty folder"
            )

    def write_tables(self, contents: dict[str, str]) -> None:
        """Write tables by file name, replacing each atomically; `BadInput` if that fails."""
        try:
            make_folder(self.path)
            for name, text in contents.items():
                write_text(self.path / name, text)
        except OSError as error:
            raise BadInput(f"--out {self.path}: the tables cannot be written there: {error.strerror}") from error
