"""Conversations as samples of a decoder, in its chat template: every answer has a loss. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from itertools import chain

from cl_dist.config.schema import TrainConfig
from cl_dist.heartbeat import beat
from cl_dist.tasks.template import ChatTemplate, common_end, common_start, cut
from cl_dist.tasks.types import IGNORE, Encoded, Task, Turn

Exchange = tuple[list[int], list[int]]
"""The ids between two answers, and those of an answer."""

logger = logging.getLogger(__name__)


class ConversationEncoder:
    """Tokenises conversations.

    Args:
        template: The chat template.
        config: Says how long a sample may be, and how it is cut.
        fit_answer: Cuts an answer that is too long, or raises BadInput, which starts with the given place.
    """

    def __init__(
        self, template: ChatTemplate, config: TrainConfig, fit_answer: Callable[[list[int], str], list[int]]
    ) -> None:
        self._template, self._config, self._fit_answer = template, config, fit_answer

    def check(self, task: Task) -> None:
        """Raise BadInput if the chat template cannot render the task's conversations. Logs how many are too long."""
        conversations = [example.turns for example in task.train if example.turns]
        too_long = sum(sum(self.lengths(turns)) > self._config.max_length for turns in conversations)
        if too_long:
            logger.warning(
                "task %r: %d of %d training samples are conversations of more than %d tokens (train.max_length); their "
                "oldest exchanges are left out, then a part of a question that is too long by itself",
                task.name,
                too_long,
                len(task.train),
                self._config.max_length,
            )

    def lengths(self, turns: Sequence[Turn]) -> tuple[int, int]:
        """Tokens of a conversation without and with a loss, before anything is left out."""
        exchanges = self._exchanges(turns)
        return sum(len(before) for before, _ in exchanges), sum(len(answer) for _, answer in exchanges)

    def sample(self, index: int, turns: Sequence[Turn], where: str) -> Encoded:
        """A conversation as one training sample of at most `max_length` tokens.

        If it is too long, its oldest exchanges are left out, then a part of the only question that remains. Raises
        BadInput, which starts with `where`, for an answer that is too long.
        """
        ids, labels = list[int](), list[int]()
        for before, answer in self._fitted(turns, 0, where):
            ids += [*before, *answer]
            labels += [IGNORE] * len(before) + answer
        return Encoded(index, ids, labels)

    def history(self, turns: Sequence[Turn], reserve: int) -> list[int]:
        """Ids of all turns before the last answer, with room for one of `reserve` tokens."""
        exchanges = self._fitted(turns, reserve, "")
        return [*chain.from_iterable([*before, *answer] for before, answer in exchanges[:-1]), *exchanges[-1][0]]

    def _exchanges(self, turns: Sequence[Turn]) -> list[Exchange]:
        beat()
        return self._template.exchanges(turns)

    def _fitted(self, turns: Sequence[Turn], reserve: int, where: str) -> list[Exchange]:
        """The exchanges at a conversation's end that fit into `max_length`, after its system prompt.

        `reserve` is the room of the last answer, in evaluation; in training it is 0, and the answer's own length
        counts.
        """
        system, rest = [turn for turn in turns if turn.role == "system"], [t for t in turns if t.role != "system"]
        while True:
            exchanges = self._exchanges([*system, *rest])
            if not reserve:
                exchanges = [(before, self._fit_answer(answer, where)) for before, answer in exchanges]
            own = len(exchanges[-1][1])
            last = reserve or own
            taken = sum(len(before) + len(answer) for before, answer in exchanges) - own + last
            if taken <= self._config.max_length:
                return exchanges
            if len(rest) == 2:
                before, answer = exchanges[0]
                return [(self._shortened(before, self._config.max_length - last), answer)]
            rest = rest[2:]

    def _shortened(self, question: list[int], room: int) -> list[int]:
        """The ids of a question, with what the template puts around it, cut between these to at most `room`."""
        head = common_start([question, self._template.head])
        tail = common_end([question[len(head) :], self._template.cue])
        own = question[len(head) : len(question) - len(tail)]
        return head + cut(own, max(room - len(head) - len(tail), 0), self._config.truncate) + tail
