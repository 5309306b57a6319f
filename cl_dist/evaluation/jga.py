"""Joint goal accuracy of dialogue state tracking, as TaSL's public script `eval_avgJGA.py` counts it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from cl_dist.tasks.types import Slot, compose


def slot_match(prediction: str, reference: str) -> float:
    """1.0 where the prediction, in lower case and without white space around it, is the reference to the letter, both
    in Unicode's normal form C.

    The reference is taken as it is: one with capitals is never met (in the benchmark there is none).
    """
    return float(compose(prediction.strip().lower()) == compose(reference))


def joint_goal_accuracy(outcomes: Iterable[tuple[Slot, bool]]) -> float:
    """Share of the turns all of whose slots are right.

    Args:
        outcomes: Of every sample its slot and whether the prediction is right. Of several samples for one slot of one
            turn the last one counts.

    Raises:
        ValueError: There is no sample.
    """
    turns: dict[str, dict[str, bool]] = defaultdict(dict)
    for slot, right in outcomes:
        turns[slot.turn][slot.name] = right
    if not turns:
        raise ValueError("no sample: there is no turn to be right")
    return sum(all(slots.values()) for slots in turns.values()) / len(turns)
