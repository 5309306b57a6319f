"""Prompts and answers as turns of a conversation, in the chat template that comes with a tokenizer.

The token ids are exactly those of the template's own rendering. Comparing renderings shows what the template puts
before and after every prompt and answer. So a long prompt can be cut without damaging the template, and nothing that
the template adds to an answer is scored as part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput
from cl_dist.tasks.types import Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["middle", "left", "right"]
T = TypeVar("T")

PROBES = ("a", "Zq", "7.")
"""Prompts without a common start or end: whatever their renderings share belongs to the template."""
ANSWER_PROBES = ("a", "Zq", "7b")
"""The same for answers. They end in letters, since many tokenizers merge a full stop with the end of the line."""

CLOCK = "strftime_now"
"""The only function in transformers' templates that reads the clock."""
DATE_CODES = (
    *(f"%-{code}" for code in "dmyHIMSj"),
    *(f"%{code}" for code in "aAbBcdDeFGhHIjklmMnpPrRStTuUVwWxXyYzZ"),
    "%%",
)
"""The codes of `strftime` on Linux; those with a minus omit leading zeros."""

SETTING = "train.template: chat"


def no_chat_template(name: str) -> BadInput:
    """The error for a model whose tokenizer has no chat template."""
    return BadInput(f"{SETTING} needs a chat template, and the tokenizer of {name} has none; use a chat model, or none")


def with_frozen_clock(template: str, date: str) -> str:
    """The template with its clock stopped at the start of a day (`YYYY-MM-DD`), so that a run resumed tomorrow uses the
    same prompts.

    A macro in the template replaces `strftime_now`, since callers cannot pass their own functions to a template.
    """
    if CLOCK not in template:
        return template
    day = datetime.fromisoformat(date)
    spelt = {code: day.strftime(code) for code in DATE_CODES} | {
        "%s": f"{day.replace(tzinfo=timezone.utc).timestamp():.0f}"
    }
    filled = "".join(f"|replace({code!r}, {text!r})" for code, text in spelt.items())
    # trim_blocks drops the newline from the rendering, and the template still begins at the start of a line.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{template}"


@dataclass(frozen=True)
class AnswerParts:
    """The ids of an answer after the cue; together they are exactly those of the template's rendering."""

    lead: list[int]
    """What the template puts before every answer but not into the question, such as Qwen3's empty think block."""
    body: list[int]
    """The answer itself."""
    tail: list[int]
    """What the template puts after every answer, including the end-of-sequence token."""

    @property
    def ids(self) -> list[int]:
        """Lead, body and tail."""
        return [*self.lead, *self.body, *self.tail]


class ChatTemplate:
    """One tokenizer's template: the user's turn asks, the assistant's turn answers.

    `date` (`YYYY-MM-DD`) is what templates get as today's date. Raises BadInput if the tokenizer has no template, or
    one that cannot be used for training.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str = TrainConfig.date) -> None:
        if not tokenizer.chat_template:
            raise no_chat_template(tokenizer.name_or_path)
        if tokenizer.eos_token_id is None:
            raise BadInput(f"{SETTING}: the tokenizer has no end-of-sequence token, which ends an answer")
        self._tokenizer = tokenizer
        self._template = with_frozen_clock(self._find_template(), date)
        self.unanswered = self._find_unanswered()
        """Text that the template adds when it asks for an answer but not in answered turns, such as the opening
        `<think>` of DeepSeek-R1. Prompts leave it out, so that evaluation asks in the same way as training."""
        probes = [self._ids(self.user_turn(probe)) for probe in PROBES]
        self.head = common_start(probes)
        """Ids before every prompt."""
        self.cue = common_end([ids[len(self.head) :] for ids in probes])
        """Ids after every prompt, including the start of the assistant's turn."""
        self._asked = self.user_turn(PROBES[0])
        self._asked_ids = self._ids(self._asked)
        self._lead_text, self.lead, self._tail = self._find_frame()

    def _find_template(self) -> str:
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError as error:  # several named templates without a default
            reason = " ".join(str(error).split())
            raise BadInput(f"{SETTING}: the tokenizer of {self._tokenizer.name_or_path}: {reason}") from error

    def _find_unanswered(self) -> str:
        question = [{"role": "user", "content": PROBES[0]}]
        asked = self._render(question, add_generation_prompt=True)
        answered = [self._render([*question, {"role": "assistant", "content": answer}]) for answer in ANSWER_PROBES]
        shared = "".join(common_start([asked, *answered]))
        ids = self._ids(asked)
        # Shorten the common text to whole tokens: `<think>` and `<answer>` share a `<`, but no token.
        while ids[: len(start := self._ids(shared))] != start:
            shared = shared[:-1]
        # At least the mark of the assistant's turn must come before every answer: it is the model's cue to answer.
        if shared != asked and len(shared) <= len(self._render(question, add_generation_prompt=False)):
            raise BadInput(
                f"{SETTING}: in the template of {self._tokenizer.name_or_path} the assistant's turn does not begin "
                "with what asks for it, so prompts and answers cannot be put together; use none"
            )
        return asked[len(shared) :]

    def user_turn(self, prompt: str) -> str:
        """The text that asks the model for an answer."""
        asked = self._render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return asked.removesuffix(self.unanswered)

    def bare(self, ids: list[int]) -> list[int]:
        """The prompt's own ids in those of its turn; none if the tokenizer merged them with the template's."""
        end = len(ids) - len(self.cue)
        whole = ids[: len(self.head)] == self.head and ids[end:] == self.cue
        return ids[len(self.head) : end] if whole else []

    @property
    def identity(self) -> str:
        """The template's text, with its clock stopped; together with the tokenizer it decides every rendering."""
        return f"jinja2 {version('jinja2')}\n{self._template}"

    def answers(self, answers: Sequence[str]) -> list[AnswerParts]:
        """For each answer, the ids of the assistant's turn after the cue, including the end-of-sequence token, which
        ends generation. It is added if the template has none there.
        """
        texts = [self._answer_text(answer) for answer in answers]
        wholes = self._tokenizer([self._asked + text for text in texts], add_special_tokens=False, verbose=False)
        rows = zip(texts, wholes["input_ids"], strict=True)
        return [self._parts(text, self._behind_asked(ids, text)) for text, ids in rows]

    def exchanges(self, turns: Sequence[Turn]) -> list[tuple[list[int], list[int]]]:
        """For each answer of a conversation, the ids between the answer before it and its own start, and its own ids.

        Put together they are the template's rendering of the whole conversation. As in `answers`, an answer ends with
        the token that ends a turn, and the last one with end-of-sequence. Raises BadInput if the template renders the
        conversation differently depending on how far it has come: then no single text has all answers as a model would
        give them.
        """
        found: list[tuple[list[int], list[int]]] = []
        so_far, rest = list[int](), list[int]()
        text = ""
        pieces = self._exchange_texts(turns)
        for number, (question, answer) in enumerate(pieces, start=1):
            sides = []
            for piece in (question, answer):
                text += piece
                whole = self._ids(text)
                # If the tokenizer merges tokens across the border, tokenise the piece by itself.
                sides.append(whole[len(so_far) :] if whole[: len(so_far)] == so_far else self._ids(piece))
                so_far = [*so_far, *sides[-1]]
            before, own = [*rest, *sides[0]], sides[1]
            if number == len(pieces):
                found.append((before, self._ended(own)))
                break
            end = next((place for place, token in enumerate(own, start=1) if token in self.stops), len(own))
            found.append((before, own[:end]))
            rest = own[end:]
        return found

    def _exchange_texts(self, turns: Sequence[Turn]) -> list[tuple[str, str]]:
        """The texts of `exchanges`."""
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        whole, done = self._render(messages), 0
        found: list[tuple[str, str]] = []
        for end, turn in enumerate(turns, start=1):
            if turn.role != "assistant":
                continue
            asked = self._render(messages[: end - 1], add_generation_prompt=True).removesuffix(self.unanswered)
            answered = self._render(messages[:end])
            if len(asked) < done or not (whole.startswith(answered) and answered.startswith(asked)):
                raise BadInput(
                    f"{SETTING}: the template of {self._tokenizer.name_or_path} renders earlier turns differently once "
                    "a conversation goes on, so conversations of several answers cannot be learnt with it; use another "
                    "model's template, or train.template: none, which makes a sample of each answer"
                )
            found.append((whole[done : len(asked)], whole[len(asked) : len(answered)]))
            done = len(answered)
        return found

    def _parts(self, text: str, ids: list[int]) -> AnswerParts:
        """An answer's parts, given its text and ids behind the question."""
        lead = self.lead if text.startswith(self._lead_text) else []
        # If the tokenizer merges the lead's last token with the answer's first one, tokenise the answer by itself.
        rest = ids[len(lead) :] if ids[: len(lead)] == lead else self._ids(text[len(self._lead_text) :])
        rest = self._ended(rest)
        tail = self._tail if rest[len(rest) - len(self._tail) :] == self._tail else rest[-1:]
        return AnswerParts(list(lead), rest[: len(rest) - len(tail)], list(tail))

    @property
    def stops(self) -> list[int]:
        """Ids that end a generated answer: end-of-sequence, and the token that ends a turn if it is a different one.

        The model has learnt to write that one first.
        """
        ends = [int(self._tokenizer.eos_token_id)]
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        return ends + [token for token in self._tail[:1] if token in special and token not in ends]

    def without_tail(self, text: str) -> str:
        """A generated answer up to the words, if any, that the template puts after every answer."""
        tail = str(self._tokenizer.decode(self._tail, skip_special_tokens=True)).strip()
        if len(tail) < 2:  # a single character such as a full stop may occur inside an answer
            return text.rstrip().removesuffix(tail)
        return text.partition(tail)[0]

    def _find_frame(self) -> tuple[str, list[int], list[int]]:
        """What the template puts before every answer, as text and as ids, and the ids after every answer."""
        texts = [self._answer_text(probe) for probe in ANSWER_PROBES]
        before, behind = "".join(common_start(texts)), "".join(common_end(texts))
        rows = [self._behind_asked(self._ids(self._asked + text), text) for text in texts]
        # If the vocabulary lacks the probes, they share the unknown token. So the common ids are limited to those of
        # the common text.
        lead = common_start([self._behind_asked(self._ids(self._asked + before), before), *rows])
        tail = common_end([row[len(lead) :] for row in rows])
        return before, lead, self._ended(tail[len(tail) - min(len(tail), len(self._ids(behind))) :])

    def _answer_text(self, answer: str) -> str:
        answered = self._render([{"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": answer}])
        return answered[len(self._asked) :]

    def _behind_asked(self, whole: list[int], text: str) -> list[int]:
        """Ids of a text that follows the question, given those of both together."""
        start = self._asked_ids
        return whole[len(start) :] if whole[: len(start)] == start else self._ids(text)

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids up to the end-of-sequence token, which is added if they have none."""
        end = int(self._tokenizer.eos_token_id)
        return [*ids[: ids.index(end)], end] if end in ids else [*ids, end]

    def _render(self, turns: list[dict[str, str]], **options: Any) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, tokenize=False, chat_template=self._template, **options
            )
            return str(rendered)
        except Exception as error:  # from jinja, or raised by the template on purpose
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadInput(f"{SETTING}: the template of {self._tokenizer.name_or_path} fails: {reason}") from error

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def cut(ids: list[int], room: int, side: Side) -> list[int]:
    """Cut ids to at most `room` of them, by dropping their middle, their start (`left`) or their end (`right`)."""
    if len(ids) <= room:
        return ids
    kept_at_end = {"middle": room // 2, "left": room, "right": 0}[side]
    return ids[: room - kept_at_end] + ids[len(ids) - kept_at_end :]


def common_start(rows: Sequence[Sequence[T]]) -> list[T]:
    """The longest start that all rows share."""
    start: list[T] = []
    for column in zip(*rows, strict=False):
        if any(item != column[0] for item in column):
            break
        start.append(column[0])
    return start


def common_end(rows: Sequence[Sequence[T]]) -> list[T]:
    """The longest end that all rows share."""
    return common_start([row[::-1] for row in rows])[::-1]
