"""Evaluation samples drawn from the training data, for data without an evaluation split (`eval_fraction`)."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from typing import Annotated

from pydantic import Field

from cl_dist.errors import BadInput
from cl_dist.tasks.formats.format import Split
from cl_dist.tasks.types import Example

HOLD_OUT = "eval_fraction: 0.1 would hold out a tenth of the training samples"
"""What to do about data without an evaluation split."""
DrawnFraction = Annotated[float, Field(gt=0.0, lt=1.0)]


def has_evaluation(fraction: float, what: str) -> BadInput:
    """The error for `eval_fraction` where there is an evaluation split already."""
    return BadInput(
        f"eval_fraction: {fraction:g} is for data without an evaluation split, and there is {what}; leave it out"
    )


def _rank(example: Example, seed: int) -> bytes:
    turns = [[turn.role, turn.content] for turn in example.turns]
    return hashlib.sha256(json.dumps([seed, example.prompt, example.answer, turns]).encode()).digest()


def draw(split: Split, fraction: float, seed: int) -> tuple[Split, Split]:
    """Divide a split into training and evaluation samples.

    The samples are ranked by a hash of the seed and their content. So the draw depends neither on their order nor on
    the file's format, and identical samples, which come together in the ranking, are all on the same side. About
    `fraction` of the samples are drawn, at least one. Raises BadInput if nothing would be left to train on.
    """
    counts = Counter(split.examples)
    ranked = sorted(counts, key=lambda example: _rank(example, seed))
    wanted, taken, held = max(1, round(fraction * len(split.examples))), 0, set[Example]()
    for example in ranked:
        if taken >= wanted:
            break
        held.add(example)
        taken += counts[example]
    if len(held) == len(ranked):
        raise BadInput(
            f"{split.origin}: eval_fraction needs at least two different samples, one of them for training, and would "
            f"hold out all {len(split.examples)}"
        )
    sides = [[place for place, each in enumerate(split.examples) if (each in held) == side] for side in (False, True)]
    train, evaluation = (
        replace(split, examples=[split.examples[i] for i in places], positions=[split.positions[i] for i in places])
        for places in sides
    )
    return train, evaluation
