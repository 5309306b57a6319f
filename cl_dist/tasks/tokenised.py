"""A stream's tokenised data: each split is tokenised when it is first needed, once. Imports no torch.

`Keep` decides where the arrays live: by default in this process, in a run in files that the ranks of a machine share
(`cl_dist.state.token_cache`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, overload

from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.samples import Samples, Table, pack, whole
from cl_dist.tasks.types import Encoded, Task

Keep = Callable[[str | None, Callable[[], Iterator[Encoded]]], Table]
"""Returns the table of some samples, given a digest of everything that decides them (None if it is unknown), and a
function that encodes them."""
What = Literal["train", "prompts", "chunks"]


def keep_here(key: str | None, encode: Callable[[], Iterator[Encoded]]) -> Table:
    """Encode into memory of this process."""
    return pack(encode())


class TokenisedData:
    """Training samples, evaluation prompts and evaluation texts of tasks.

    Args:
        encoder: The stream's encoder.
        keep: Where tables are kept.
    """

    def __init__(self, encoder: Encoder, keep: Keep = keep_here) -> None:
        self.encoder = encoder
        self._keep = keep
        identity = encoder.identity()
        self._identity = None if identity is None else _digest([json.dumps(identity, sort_keys=True)])
        self._tables: dict[tuple[What, int], tuple[Task, Table]] = {}

    def train(self, task: Task) -> Samples:
        """The task's training samples (`Encoder.train`)."""
        return self._get("train", task)

    def prompts(self, task: Task) -> Samples:
        """The prompts of the task's evaluation samples, without labels (`Encoder.prompt_ids`)."""
        return self._get("prompts", task)

    def chunks(self, task: Task) -> Samples:
        """The chunks of a text's evaluation split (`Encoder.text_chunks`)."""
        return self._get("chunks", task)

    def stream(self, tasks: Sequence[Task]) -> Stream:
        """The training samples of all tasks, each tokenised when it is looked up."""
        return Stream(lambda index: self.train(tasks[index]), range(len(tasks)))

    def _get(self, what: What, task: Task) -> Samples:
        place = (what, id(task))
        if place not in self._tables:
            # The task comes along, so that no other object gets its id.
            self._tables[place] = (task, self._keep(self._key(what, task), lambda: self._encode(what, task)))
        return whole(self._tables[place][1])

    def _encode(self, what: What, task: Task) -> Iterator[Encoded]:
        if what == "train":
            return self.encoder.each_training_sample(task)
        if what == "prompts":
            return self.encoder.each_prompt(task)
        return self.encoder.each_chunk(task.evaluation)

    def _key(self, what: What, task: Task) -> str | None:
        """A digest of everything that decides the ids: tokenizer, settings, code and texts, but not where they are."""
        if self._identity is None:
            return None
        return _digest([*_head(what, task), self._identity, task.kind, *_texts(what, task)])


class Stream(Sequence[Sequence[Encoded]]):
    """Samples per task, loaded when they are looked up; so is a slice, which is a `Stream` too."""

    def __init__(self, load: Callable[[int], Samples], positions: Sequence[int]) -> None:
        self._load, self._positions = load, positions

    def __len__(self) -> int:
        """Number of tasks."""
        return len(self._positions)

    @overload
    def __getitem__(self, place: int) -> Samples: ...
    @overload
    def __getitem__(self, place: slice) -> Stream: ...
    def __getitem__(self, place: int | slice) -> Any:
        """The samples of one task, or the tasks of a slice."""
        if isinstance(place, slice):
            return Stream(self._load, self._positions[place])
        return self._load(self._positions[place])


def _head(what: What, task: Task) -> Iterator[str]:
    """What is encoded; with conversations their turns too, which decide the ids together with the texts."""
    yield what
    examples = task.train if what == "train" else task.evaluation
    if any(example.turns for example in examples):
        yield "turns"
        yield from (json.dumps([[turn.role, turn.content] for turn in example.turns]) for example in examples)


def _texts(what: What, task: Task) -> Iterator[str]:
    if what == "train":
        for example in task.train:
            yield example.prompt
            yield example.answer
    else:
        yield from (each.prompt if what == "prompts" else each.answer for each in task.evaluation)


def _digest(texts: Iterable[str]) -> str:
    """SHA-256 of texts in order, each with its length, so that no two sequences are the same bytes."""
    digest = hashlib.sha256()
    for text in texts:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "little"))
        digest.update(content)
    return digest.hexdigest()
