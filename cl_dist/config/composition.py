"""Which methods compose: the pairs that do not, each with its reason. A new method enters its pairs here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

FUSING = ("kif", "tasl", "recurrent_kif")
"""Methods that fuse the weights before a task with those after it."""
GROWING = ("inclora", "olora")
"""Methods that train new adapters in every task."""
BOUNDS = ("per_task", "multi_task")
"""Bounds of the field's tables; no task has a past."""


@dataclass(frozen=True)
class Exclusion:
    """Every method of one group excludes every method of the other; a method does not exclude itself."""

    first: tuple[str, ...]
    second: tuple[str, ...] | None
    """None: every method but `sequential`, which does nothing."""
    why: str

    def covers(self, one: str, other: str) -> bool:
        """Whether the two exclude each other for this reason, in whichever order."""
        return one != other and (self._covers(one, other) or self._covers(other, one))

    def _covers(self, one: str, other: str) -> bool:
        return one in self.first and (other in self.second if self.second is not None else other != "sequential")


EXCLUSIONS = (
    Exclusion(("per_task",), ("multi_task",), "the one trains every task by itself, the other all tasks at once"),
    Exclusion(("per_task",), None, "per_task starts every task from the untouched weights and keeps nothing"),
    Exclusion(("multi_task",), None, "multi_task learns all tasks at once, so that no task has a past"),
    Exclusion(FUSING, FUSING, "kif, tasl and recurrent_kif all fuse weights; give one of them"),
    Exclusion(GROWING, GROWING, "both train a new adapter in every task, olora with a penalty; give one of them"),
    Exclusion(
        GROWING, FUSING, "fusion mixes an adapter's weights before and after a task, and here every task has its own"
    ),
    Exclusion(
        GROWING,
        ("ewc",),
        "ewc holds back weights that past tasks have trained, and here those are frozen adapters; lwf and agem compose",
    ),
    Exclusion(("recurrent_kif",), ("replay",), "recurrent_kif has a memory of past samples of its own (replay_ratio)"),
)
"""The first that fits a pair is told. kif and tasl exclude replay only while their own `replay_ratio` is above 0."""


def exclusion(one: str, other: str) -> Exclusion | None:
    """Why two methods do not compose; None: they do."""
    return next((entry for entry in EXCLUSIONS if entry.covers(one, other)), None)


def _refuse_anchor_before_fusion(names: Sequence[str]) -> None:
    """What ewc holds on to must be what the next task starts from: the weights after the fusion, not before it."""
    later = names[names.index("ewc") + 1 :] if "ewc" in names else ()
    fusing = next((name for name in later if name in FUSING), None)
    if fusing is not None:
        raise ValueError(
            f"method: ewc before {fusing} would hold on to the weights before the fusion and undo it; "
            f"give {fusing} first"
        )


def refuse_exclusive(names: Sequence[str]) -> None:
    """Raise ValueError where two of the methods exclude each other."""
    for one, other in combinations(names, 2):
        entry = exclusion(one, other)
        if entry is not None:
            raise ValueError(f"method: {one} and {other} do not compose: {entry.why}")
    _refuse_anchor_before_fusion(names)
