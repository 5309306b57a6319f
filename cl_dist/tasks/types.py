"""What a task is, before and after tokenisation. Plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cl_dist.config.objectives import TaskKind

IGNORE = -100
"""Label of a position that takes no part in the loss (PyTorch's `ignore_index`)."""

Kind = TaskKind
LabelSource = Literal["recipe", "data", "training answers"]
ScoredOn = Literal["test", "dev", "train"]


@dataclass(frozen=True)
class Slot:
    """What a sample of dialogue state tracking asks for: one slot after one turn of a dialogue."""

    turn: str
    """The dialogue and the turn in it."""
    name: str
    """The service and its slot."""


@dataclass(frozen=True)
class Example:
    """One record: the prompt that the model sees and the answer that it should give (`text`: prompt empty, answer the
    text).
    """

    prompt: str
    answer: str
    references: tuple[str, ...] = ()
    """All answers that are right, where there are several; training is on `answer`, the first of them, alone."""
    slot: Slot | None = None
    """Of an evaluation sample of dialogue state tracking: what it asks for."""


@dataclass(frozen=True)
class Task:
    """One task of the stream, read and checked."""

    name: str
    kind: Kind
    train: Sequence[Example]
    evaluation: Sequence[Example]
    labels: tuple[str, ...] = ()
    """Allowed answers of a classification task, in a fixed order; else empty."""
    origins: tuple[str, str] = ("", "")
    """Files (or data set and split) that the training and the evaluation samples come from, for messages."""
    labels_from: LabelSource | None = None
    """Where the labels were found; None where there are none."""
    unlisted: int = 0
    """Evaluation samples whose answer is none of the labels, which were found in the training answers."""
    scored_on: ScoredOn = "test"
    """Which split `evaluation` is."""


@dataclass(frozen=True)
class Encoded:
    """One tokenised sample."""

    index: int
    """Position in the task's split; -1 marks a filler that evens out ranks and is counted nowhere."""
    input_ids: list[int]
    labels: list[int]
    """causal_lm and masked_lm: as long as input_ids, IGNORE where there is no loss (not shifted). seq2seq_lm: the
    answer.
    classification: one number, the label's index in the stream-wide label list."""

    @property
    def targets(self) -> int:
        """Number of positions that take part in the loss."""
        return sum(label != IGNORE for label in self.labels)
