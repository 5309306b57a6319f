"""Weights & Biases, online or offline (`WANDB_MODE=offline`); its files are in the run folder, in `wandb/`."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from typing_extensions import override

from cl_dist.tracking.tracker import PROJECT, RunFacts, Tracker

STEP = "step"
"""The axis of all values. Weights & Biases' own steps may not go back, as those of a resumed run do."""


class _Wandb(Tracker):
    def __init__(self) -> None:
        self._wandb: Any = None
        self._run: Any = None

    @override
    def start(self, run: RunFacts) -> str | None:
        import wandb

        self._wandb = wandb
        # It would capture what the run prints, and print itself.
        settings = wandb.Settings(console="off", silent=True, init_timeout=60)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=os.environ.get("WANDB_NAME", run.folder.absolute().name),
            id=run.identity or secrets.token_hex(4),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.settings),
            settings=settings,
        )
        self._run.define_metric("*", step_metric=STEP)
        return str(self._run.id)

    @override
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log({**values, STEP: step})

    @override
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        self._run.log({name: self._wandb.Table(columns=list(columns), data=[list(row) for row in rows]), STEP: step})

    @override
    def finish(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "finished" else 1)


def tracker() -> Tracker:
    """A new tracker."""
    return _Wandb()
