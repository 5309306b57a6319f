"""Prompts and answers as the turns of a conversation, in the chat template that comes with a tokenizer.

The token ids are those that the template's own rendering has as a whole. What it puts before and behind every prompt
and every answer is found by comparing renderings: a prompt that is too long can be cut without cutting the template,
and nothing that the template adds to an answer is scored as part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

PROBES = ("a", "Zq", "7.")
"""Prompts that share no start and no end: what their renderings share is the template's."""
ANSWER_PROBES = ("a", "Zq", "7b")
"""Answers of the same kind. They end in letters, since many tokenizers join a full stop with the line's end."""

CLOCK = "strftime_now"
"""The one function of transformers' templates that knows the time."""
DATE_CODES = (
    *(f"%-{code}" for code in "dmyHIMSj"),
    *(f"%{code}" for code in "aAbBcdDeFGhHIjklmMnpPrRStTuUVwWxXyYzZ"),
    "%%",
)
"""What `strftime` writes on Linux; those with a minus have no zeros in front."""

SETTING = "train.template: chat"


def no_chat_template(name: str) -> BadInput:
    """The error for a model whose tokenizer has no template."""
    return BadInput(f"{SETTING} needs a chat template, and the tokenizer of {name} has none; use a chat model, or none")


def with_frozen_clock(template: str, date: str) -> str:
    """The template with a clock that stands still at the start of a day (`YYYY-MM-DD`): a run that goes on tomorrow
    asks with the same prompts.

    What templates know as `strftime_now` becomes a macro of the template's own, since transformers passes no functions
    to templates.
    """
    if CLOCK not in template:
        return template
    day = datetime.fromisoformat(date)
    spelt = {code: day.strftime(code) for code in DATE_CODES} | {
        "%s": f"{day.replace(tzinfo=timezone.utc).timestamp():.0f}"
    }
    filled = "".join(f"|replace({code!r}, {text!r})" for code, text in spelt.items())
    # The line's end is no part of the rendering (trim_blocks), and the template still begins at the start of a line.
    return f"{{% macro {CLOCK}(format) %}}{{{{ format{filled} }}}}{{% endmacro %}}\n{template}"


@dataclass(frozen=True)
class AnswerParts:
    """An answer's ids behind the cue: together what the template's own rendering has."""

    lead: list[int]
    """What the template puts before every answer and does not ask with, such as Qwen3's empty think block."""
    body: list[int]
    """The answer itself."""
    tail: list[int]
    """What the template puts behind every answer, up to and with the end-of-sequence token."""

    @property
    def ids(self) -> list[int]:
        """All of it."""
        return [*self.lead, *self.body, *self.tail]


class ChatTemplate:
    """One tokenizer's template: a user's turn that asks, and the assistant's that answers.

    `date` (`YYYY-MM-DD`) is the day that a template which writes the date is given.

    Raises BadInput where the tokenizer has no template, or one that cannot be used for training.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, date: str = TrainConfig.date) -> None:
        if not tokenizer.chat_template:
            raise no_chat_template(tokenizer.name_or_path)
        if tokenizer.eos_token_id is None:
            raise BadInput(f"{SETTING}: the tokenizer has no end-of-sequence token, which ends an answer")
        self._tokenizer = tokenizer
        self._template = with_frozen_clock(self._find_template(), date)
        self.unanswered = self._find_unanswered()
        """Text with which the template asks for an answer but which its answered turns lack, such as the opening
        `<think>` of DeepSeek-R1. Prompts leave it out, so that evaluation asks as training did."""
        probes = [self._ids(self.user_turn(probe)) for probe in PROBES]
        self.head = _common_start(probes)
        """Ids before every prompt."""
        self.cue = _common_end([ids[len(self.head) :] for ids in probes])
        """Ids behind every prompt, the start of the assistant's turn among them."""
        self._asked = self.user_turn(PROBES[0])
        self._lead_text, self.lead, self._tail = self._find_frame()

    def _find_template(self) -> str:
        try:
            return str(self._tokenizer.get_chat_template())
        except ValueError as error:  # several templates by name, and none that is the default
            reason = " ".join(str(error).split())
            raise BadInput(f"{SETTING}: the tokenizer of {self._tokenizer.name_or_path}: {reason}") from error

    def _find_unanswered(self) -> str:
        question = [{"role": "user", "content": PROBES[0]}]
        asked = self._render(question, add_generation_prompt=True)
        answered = [self._render([*question, {"role": "assistant", "content": answer}]) for answer in ANSWER_PROBES]
        shared = "".join(_common_start([asked, *answered]))
        ids = self._ids(asked)
        while ids[: len(start := self._ids(shared))] != start:  # `<think>` and `<answer>` share a `<`, but no token
            shared = shared[:-1]
        # The turn's own mark, at least, has to come before every answer: it is what the model learns to answer to.
        if shared != asked and len(shared) <= len(self._render(question, add_generation_prompt=False)):
            raise BadInput(
                f"{SETTING}: in the template of {self._tokenizer.name_or_path} the assistant's turn does not begin "
                "with what asks for it, so prompts and answers cannot be put together; use none"
            )
        return asked[len(shared) :]

    def user_turn(self, prompt: str) -> str:
        """The text that the model answers."""
        asked = self._render([{"role": "user", "content": prompt}], add_generation_prompt=True)
        return asked.removesuffix(self.unanswered)

    def bare(self, ids: list[int]) -> list[int]:
        """A prompt's own ids out of those of its turn; none where they have grown together with the template's."""
        end = len(ids) - len(self.cue)
        whole = ids[: len(self.head)] == self.head and ids[end:] == self.cue
        return ids[len(self.head) : end] if whole else []

    def answer(self, answer: str) -> AnswerParts:
        """Ids of the assistant's turn behind the cue, up to and with the end-of-sequence token, which ends generation;
        where the template has none there, it is put behind.
        """
        text = self._answer_text(answer)
        ids = self._ids_behind(self._asked, text)
        lead = self.lead if text.startswith(self._lead_text) else []
        # Where the lead's last token has grown together with the answer's first, each is tokenised by itself.
        rest = ids[len(lead) :] if ids[: len(lead)] == lead else self._ids(text[len(self._lead_text) :])
        rest = self._ended(rest)
        tail = self._tail if rest[len(rest) - len(self._tail) :] == self._tail else rest[-1:]
        return AnswerParts(list(lead), rest[: len(rest) - len(tail)], list(tail))

    @property
    def stops(self) -> list[int]:
        """Ids that end a generated answer: the end of sequence, and the token that ends a turn where that is another
        one, which the model was taught to write first.
        """
        ends = [int(self._tokenizer.eos_token_id)]
        special = {*self._tokenizer.all_special_ids, *self._tokenizer.added_tokens_decoder}
        return ends + [token for token in self._tail[:1] if token in special and token not in ends]

    def without_tail(self, text: str) -> str:
        """A generated answer without the words that the template puts behind every answer, and what follows them."""
        tail = str(self._tokenizer.decode(self._tail, skip_special_tokens=True)).strip()
        if len(tail) < 2:  # a lone full stop, say, may well stand inside an answer
            return text.rstrip().removesuffix(tail)
        return text.partition(tail)[0]

    def _find_frame(self) -> tuple[str, list[int], list[int]]:
        """What is put before every answer, as text and as ids, and the ids behind every answer."""
        texts = [self._answer_text(probe) for probe in ANSWER_PROBES]
        before, behind = "".join(_common_start(texts)), "".join(_common_end(texts))
        rows = [self._ids_behind(self._asked, text) for text in texts]
        # Bounded by the text's own ids: probes that the vocabulary lacks share the token for what is unknown.
        lead = _common_start([self._ids_behind(self._asked, before), *rows])
        tail = _common_end([row[len(lead) :] for row in rows])
        return before, lead, self._ended(tail[len(tail) - min(len(tail), len(self._ids(behind))) :])

    def _answer_text(self, answer: str) -> str:
        """The assistant's turn behind what asks for it."""
        told = self._render([{"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": answer}])
        return told[len(self._asked) :]

    def _ids_behind(self, before: str, text: str) -> list[int]:
        """Ids of a text as they follow another one."""
        start, whole = self._ids(before), self._ids(before + text)
        return whole[len(start) :] if whole[: len(start)] == start else self._ids(text)

    def _ended(self, ids: list[int]) -> list[int]:
        """The ids up to and with the end-of-sequence token, put behind where they have none."""
        end = int(self._tokenizer.eos_token_id)
        return [*ids[: ids.index(end)], end] if end in ids else [*ids, end]

    def _render(self, turns: list[dict[str, str]], **options: Any) -> str:
        try:
            rendered = self._tokenizer.apply_chat_template(
                turns, tokenize=False, chat_template=self._template, **options
            )
            return str(rendered)
        except Exception as error:  # jinja's own, and whatever a template raises on purpose
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadInput(f"{SETTING}: the template of {self._tokenizer.name_or_path} fails: {reason}") from error

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _common_start(rows: Sequence[Sequence[T]]) -> list[T]:
    """What all rows begin with."""
    start: list[T] = []
    for column in zip(*rows, strict=False):
        if any(item != column[0] for item in column):
            break
        start.append(column[0])
    return start


def _common_end(rows: Sequence[Sequence[T]]) -> list[T]:
    """What all rows end with."""
    return _common_start([row[::-1] for row in rows])[::-1]
