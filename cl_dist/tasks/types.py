"""What a task is, before and after tokenisation: plain data. And when two texts of a task count as the same."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cl_dist.config.objectives import TaskKind

IGNORE = -100
"""Label of a position that takes no part in the loss (PyTorch's `ignore_index`)."""

Kind = TaskKind
LabelSource = Literal["recipe", "data", "training answers"]
ScoredOn = Literal["test", "dev", "train", "held-out"]
"""`held-out`: samples that were drawn from the training data and are not trained on."""
Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Turn:
    """One message of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True)
class Slot:
    """What a sample of dialogue state tracking asks for: the value of one slot after one turn of a dialogue."""

    turn: str
    """The dialogue and the number of the turn."""
    name: str
    """The service and the slot."""


@dataclass(frozen=True)
class Example:
    """One record: the prompt that the model sees and the answer that it should give.

    A document of plain text is an answer with an empty prompt.
    """

    prompt: str
    answer: str
    references: tuple[str, ...] = ()
    """All right answers, if there are several. Training uses only `answer`, the first of them."""
    slot: Slot | None = None
    """What an evaluation sample of dialogue state tracking asks for."""
    turns: tuple[Turn, ...] = ()
    """A conversation with a system prompt or several answers, in full; `answer` is the last turn, and `prompt` the
    others as plain text. Empty for one question and its answer."""


@dataclass(frozen=True)
class Task:
    """One task of the stream, read and checked."""

    name: str
    kind: Kind
    train: Sequence[Example]
    evaluation: Sequence[Example]
    labels: tuple[str, ...] = ()
    """Allowed answers of a classification task, in a fixed order; empty for other tasks."""
    origins: tuple[str, str] = ("", "")
    """Files (or data set and split) of the training and the evaluation samples, for messages."""
    labels_from: LabelSource | None = None
    """Where the labels come from; None without labels."""
    unlisted: int = 0
    """Number of evaluation samples whose answer is not a label; possible if labels come from the training answers."""
    scored_on: ScoredOn = "test"
    """The split that `evaluation` is."""
    read_as: str = ""
    """What the records hold, and in which columns; empty for formats whose records have fixed fields."""


@dataclass(frozen=True)
class Encoded:
    """One tokenised sample."""

    index: int
    """Position in the task's split; -1 for a filler, which evens out the ranks' batches and never counts."""
    input_ids: list[int]
    labels: list[int]
    """causal_lm and masked_lm: as long as input_ids, not shifted, IGNORE at positions without loss. seq2seq_lm: the
    answer. classification: one number, the label's index among the labels of the whole stream."""

    @property
    def targets(self) -> int:
        """Number of positions that take part in the loss."""
        return len(self.labels) - self.labels.count(IGNORE)


def compose(text: str) -> str:
    """The text in Unicode's normal form C, in which labels, answers and predictions are compared.

    Depending on who wrote the file, an é is one character or two (an e and an accent). To a reader both are the same.
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)
