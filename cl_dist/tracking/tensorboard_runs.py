"""TensorBoard: event files in the run folder, in `tensorboard/`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from cl_dist.config.yaml_text import render_yaml
from cl_dist.report.tables import markdown
from cl_dist.tracking.tracker import RunFacts, Tracker


class _TensorBoard(Tracker):
    def __init__(self) -> None:
        self._folder = Path()
        self._writer: Any = None
        self._started = ""

    @override
    def start(self, run: RunFacts) -> str | None:
        import torch.utils.tensorboard  # noqa: F401 - fails now, not at the first value

        self._folder = run.folder / "tensorboard"
        self._started = "" if run.identity else render_yaml(run.settings)
        return str(self._folder)

    @override
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._at(step).add_scalar(name, value, step)
        self._writer.flush()  # a killed run keeps what it had reported

    @override
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        shown = [
            ["" if cell is None else f"{cell:.4f}" if isinstance(cell, float) else str(cell) for cell in row]
            for row in rows
        ]
        self._at(step).add_text(name, markdown(columns, shown), step)

    @override
    def finish(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()

    def _at(self, step: int) -> Any:
        """The writer. A resumed run repeats steps: TensorBoard drops the old values from the first new one on."""
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(self._folder, purge_step=step)
            if self._started:
                self._writer.add_text("recipe", f"```yaml\n{self._started}```", step)
        return self._writer


def tracker() -> Tracker:
    """A new tracker."""
    return _TensorBoard()
