"""What a tracker of experiments has to do, and which ones there are."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from cl_dist.errors import BadInput

PROJECT = "cl_dist"
"""Project (Weights & Biases) or experiment (MLflow) of a run, unless the library's own variable names another one."""
MODULES = {"wandb": "wandb", "tensorboard": "tensorboard", "mlflow": "mlflow"}
"""The module that each tracker needs; the extra of the same name installs it."""


@dataclass(frozen=True)
class RunFacts:
    """What a tracker is told about the run when it starts."""

    folder: Path
    """The run folder."""
    settings: Mapping[str, Any]
    """The recipe, nested, as JSON types."""
    identity: str | None
    """What `Tracker.start` returned when the run was started; None in its first start."""


class Tracker(ABC):
    """One library. Every method may raise anything and take any time: `feed.py` deals with both."""

    @abstractmethod
    def start(self, run: RunFacts) -> str | None:
        """Begin or continue; return what identifies the tracker's run, to continue it after a resume."""

    @abstractmethod
    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Record numbers by name at an optimiser step of the whole stream."""

    @abstractmethod
    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """Record a table, which replaces an earlier one of that name."""

    @abstractmethod
    def finish(self, status: str) -> None:
        """End: `finished`, `interrupted` or `failed`."""


def check_trackers(names: Sequence[str]) -> None:
    """Raise BadInput unless the library of every tracker is installed; imports none."""
    for name in names:
        if find_spec(MODULES[name]) is None:
            raise BadInput(
                f"track: {name} is not installed; run `pip install 'cl-dist[{name}]'`, or leave {name} out of track"
            )


def make_tracker(name: str) -> Tracker:
    """The tracker of that name. Imports our module for it; the library itself is imported by `Tracker.start`."""
    tracker: Tracker = import_module(f"cl_dist.tracking.{name}_runs").tracker()
    return tracker


def leaves(settings: Any, above: str = "") -> dict[str, Any]:
    """Nested settings as one level, by dotted key; a list is a text."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= leaves(value, f"{above}{key}.")
        else:
            found[f"{above}{key}"] = str(value) if isinstance(value, list | tuple) else value
    return found
