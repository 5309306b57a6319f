"""From prompts and answers to token ids, under each training objective. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

from cl_dist.config.objectives import FACTS, ObjectiveName
from cl_dist.config.schema import TrainConfig
from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.heartbeat import beat
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.template import AnswerParts, ChatTemplate
from cl_dist.tasks.types import Encoded, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Side = Literal["middle", "left", "right"]

logger = logging.getLogger(__name__)

_TEXTS_AT_ONCE = 10_000
ANCHOR = ":"
"""Answers are tokenised after this text, to get the ids that they have after a prompt."""


def label_names(tasks: Iterable[Task]) -> tuple[str, ...]:
    """The distinct labels of all tasks, in the order in which they first appear."""
    return tuple(dict.fromkeys(label for task in tasks for label in task.labels))


def check_kind(task: Task, objective: ObjectiveName) -> None:
    """Raise BadInput if the objective cannot learn this kind of task."""
    kinds = FACTS[objective].learns
    if task.kind not in kinds:
        raise BadInput(
            f"task {task.name!r} is {task.kind}, but {objective} learns {listed(kinds, last='or')} only "
            "(model.objective)"
        )


def cut(ids: list[int], room: int, side: Side) -> list[int]:
    """Cut ids to at most `room` of them, by dropping their middle, their start (`left`) or their end (`right`)."""
    if len(ids) <= room:
        return ids
    kept_at_end = {"middle": room // 2, "left": room, "right": 0}[side]
    return ids[: room - kept_at_end] + ids[len(ids) - kept_at_end :]


def find_special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special ids that the tokenizer adds before and after a text, such as BOS, EOS, CLS and SEP."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []


class Encoder:
    """Tokenises the samples of a stream for one model. The result depends on nothing but the arguments."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        objective: ObjectiveName,
        train: TrainConfig,
        label_names: tuple[str, ...],
    ) -> None:
        """`label_names` are the labels of the whole stream, in the order of a classifier's outputs.

        Raises BadInput if the tokenizer lacks the tokens or the chat template that objective and settings need, if
        `max_length` has no room for a prompt, or if a label is too long.
        """
        self._tokenizer = tokenizer
        self._objective, self._facts = OBJECTIVES[objective], FACTS[objective]
        self._config = train
        self._class_of = {name: number for number, name in enumerate(label_names)}
        self._answers: dict[str, AnswerParts] = {}
        self._prefix, self._suffix = self._objective.frame(*find_special_tokens(tokenizer))
        self._around_text = (self._prefix, self._suffix)
        self._template = self._chat_template()
        self._lead: list[int] = []
        if self._template is not None:
            self._prefix, self._suffix = self._template.head, self._template.cue
            self._lead = self._template.lead
        self._check_tokenizer()
        lengths = [len(self._fitting_answer(name, f"label {name!r}")) for name in label_names if self._facts.generates]
        self._reserve = max(lengths, default=min(train.max_target_length, train.max_length // 2))

    @property
    def unanswered_cue(self) -> str:
        """Text that the chat template adds to a question but not to an answered turn. Prompts leave it out."""
        return "" if self._template is None else self._template.unanswered

    @property
    def pad_id(self) -> int:
        """Id to pad with: the tokenizer's padding token, or its end-of-sequence token if it has none."""
        pad = self._tokenizer.pad_token_id
        return int(pad if pad is not None else self._tokenizer.eos_token_id)

    def train(self, task: Task) -> list[Encoded]:
        """The task's training samples in file order, or the chunks of a plain text.

        With `long_answers: cut`, logs how many answers are cut; otherwise raises BadInput, which names the sample, for
        an answer that is too long. Also raises BadInput if the objective cannot learn this kind of task.
        """
        check_kind(task, self._objective.name)
        if task.kind == "text":
            return self.text_chunks(task.train)
        prompts = self._tokenize_prompts([example.prompt for example in task.train])
        self._report_cut_answers(task)
        return [
            self._sample(index, ids, example.answer, f"task {task.name!r}, training sample {index}")
            for index, (ids, example) in enumerate(zip(prompts, task.train, strict=True))
        ]

    def text_chunks(self, documents: Iterable[Example]) -> list[Encoded]:
        """Join documents and cut them into chunks of at most `max_length` tokens, including special tokens.

        The labels are the ids, with IGNORE for the special tokens that start or end a chunk and for a decoder's first
        token. For `masked_lm`, they mark the tokens that `mask_tokens` may mask.
        """
        ends = self._objective.document_end(self._tokenizer.eos_token_id)
        tokenised = self._tokenize([document.answer for document in documents])
        stream = [token for ids in tokenised for token in (*ids, *ends)]
        room = self._config.max_length - sum(map(len, self._around_text))
        prefix, suffix = self._around_text
        chunks = [
            self._objective.chunk(number, prefix, stream[start : start + room], suffix)
            for number, start in enumerate(range(0, len(stream), room))
        ]
        return [chunk for chunk in chunks if chunk.targets]

    def prompt_ids(self, prompt: str, answer_length: int | None = None) -> list[int]:
        """Ids of a prompt from which a model continues in evaluation, cut to `max_length`.

        They include the tokenizer's special tokens or its chat template, also what the template puts before every
        answer. A decoder's prompt leaves room for an answer of `answer_length` tokens; by default, that is the stream's
        longest label or, without labels, the longest allowed answer, at most half of `max_length`.
        """
        (ids,) = self._tokenize_prompts([prompt])
        return self._framed(ids, self._reserve if answer_length is None else answer_length) + self._lead

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of an answer as they follow a prompt in training, ending with end-of-sequence.

        They include everything that a chat template puts around the answer.
        """
        return self._parts(answer).ids

    def scored_ids(self, answer: str) -> list[int]:
        """Ids of an answer as they follow `prompt_ids` in evaluation.

        Of what the chat template adds, only the token that ends the answer counts. Without it, a label would win just
        because it is the start of another one.
        """
        parts = self._parts(answer)
        return [*parts.body, *parts.tail[:1]]

    def generated_ids(self, answer: str) -> list[int]:
        """Ids that a model generates after `prompt_ids` if it has learnt an answer, including the token that stops it.

        Words that the chat template puts after an answer come before that token.
        """
        parts = self._parts(answer)
        end = next(place for place, token in enumerate(parts.tail) if token in self.stops)
        return [*parts.body, *parts.tail[: end + 1]]

    @property
    def stops(self) -> list[int]:
        """Ids that stop the generation of an answer."""
        return [int(self._tokenizer.eos_token_id)] if self._template is None else self._template.stops

    def answer_text(self, ids: Sequence[int]) -> str:
        """The answer in generated ids, without special tokens, surrounding white space and the template's own words."""
        text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
        return (text if self._template is None else self._template.without_tail(text)).strip()

    def _parts(self, answer: str) -> AnswerParts:
        if answer not in self._answers and self._template is not None:
            self._answers[answer] = self._template.answer(answer)
        elif answer not in self._answers:
            self._answers[answer] = AnswerParts([], self._bare_answer(answer), [int(self._tokenizer.eos_token_id)])
        return self._answers[answer]

    def _bare_answer(self, answer: str) -> list[int]:
        if self._facts.answer_apart:
            return self._tokenize([answer])[0]
        if not answer:  # otherwise the space between prompt and answer would remain
            return []
        # A decoder's answer follows a prompt and a space, and many tokenizers merge the space with the first word.
        anchored, anchor, spaced = self._tokenize([f"{ANCHOR} {answer}", ANCHOR, f" {answer}"])
        return anchored[len(anchor) :] if anchored[: len(anchor)] == anchor else spaced

    def _sample(self, index: int, prompt: list[int], answer: str, where: str) -> Encoded:
        target = self._training_answer(answer, where) if self._facts.generates else [self._class_of[answer]]
        return self._objective.sample(index, self._framed(prompt, len(target)), target)

    def _framed(self, prompt: list[int], answer_length: int) -> list[int]:
        """The prompt between its special tokens, cut to fit `max_length`; for a decoder, together with its answer."""
        taken = len(self._prefix) + len(self._suffix) + (answer_length if self._facts.answer_in_prompt else 0)
        room = max(self._config.max_length - taken, 0)
        return self._prefix + cut(prompt, room, self._config.truncate) + self._suffix

    def _training_answer(self, answer: str, where: str) -> list[int]:
        """Ids of a sample's answer. If it is too long, `long_answers` decides between an error and a cut."""
        ids, room = self.answer_ids(answer), self._answer_room
        if self._config.long_answers == "error" or len(ids) <= room or room < 1:
            return self._fitting_answer(answer, where)
        return [*ids[: room - 1], ids[-1]]

    @property
    def _answer_room(self) -> int:
        """Most tokens of an answer. A decoder needs room for at least one token of the prompt too."""
        if not self._facts.answer_in_prompt:
            return self._config.max_target_length
        room = self._config.max_length - len(self._prefix) - len(self._suffix) - 1
        return min(self._config.max_target_length, room)

    def _report_cut_answers(self, task: Task) -> None:
        if self._config.long_answers == "error" or not self._facts.generates:
            return
        room = self._answer_room
        count = sum(len(self.answer_ids(example.answer)) > room for example in task.train)
        if count:
            logger.warning(
                "task %r: %d of %d training answers are cut to %d tokens (train.long_answers)",
                task.name,
                count,
                len(task.train),
                room,
            )

    def _fitting_answer(self, answer: str, where: str) -> list[int]:
        """Ids of an answer. Raises BadInput, which starts with `where`, if it is longer than the settings allow."""
        ids = self.answer_ids(answer)
        limit = self._config.max_target_length
        if len(ids) > limit:
            # The settings cut other answers that are too long, so this one must be a label.
            cuts = self._config.long_answers == "cut"
            hint = "; a label is never cut: lower stream.max_labels where the task is to generate text" if cuts else ""
            raise BadInput(f"{where}: the answer takes {len(ids)} tokens, but train.max_target_length is {limit}{hint}")
        # A decoder needs some of the prompt too: it cannot predict the answer's first token from nothing.
        needed = len(self._prefix) + len(self._suffix) + 1 + len(ids)
        if self._facts.answer_in_prompt and needed > self._config.max_length:
            raise BadInput(
                f"{where}: the answer takes {len(ids)} tokens, so train.max_length must be at least {needed}, "
                f"not {self._config.max_length}"
            )
        return ids

    def _chat_template(self) -> ChatTemplate | None:
        """The tokenizer's chat template, if the settings ask for it. Raises BadInput unless the model is a decoder."""
        if self._config.template == "none":
            return None
        if not self._facts.answer_in_prompt:
            raise BadInput(f"train.template: chat is for decoders, but the model's objective is {self._objective.name}")
        return ChatTemplate(self._tokenizer, self._config.date)

    def _tokenize_prompts(self, prompts: Sequence[str]) -> list[list[int]]:
        """Ids of each prompt, without special tokens or template."""
        if self._template is None:
            return self._tokenize(prompts)
        # Tokenise prompts inside the template, since the text around them may change their first and last token.
        rendered = self._tokenize([self._template.user_turn(prompt) for prompt in prompts])
        return [
            self._template.bare(ids) or self._tokenize([prompt])[0]
            for ids, prompt in zip(rendered, prompts, strict=True)
        ]

    def _tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without special tokens."""
        encoded: list[list[int]] = []
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            some = list(texts[start : start + _TEXTS_AT_ONCE])
            encoded += self._tokenizer(some, add_special_tokens=False, verbose=False)["input_ids"]
            beat()
        return encoded

    def _check_tokenizer(self) -> None:
        """Raise BadInput if the tokenizer lacks tokens that the objective needs, or if they fill `max_length`."""
        for token, described in (("eos", "end-of-sequence"), ("mask", "mask")):
            if token in self._facts.needs_tokens and getattr(self._tokenizer, f"{token}_token_id") is None:
                raise BadInput(f"the tokenizer has no {described} token, which {self._objective.name} needs")
        if self._tokenizer.pad_token_id is None and self._tokenizer.eos_token_id is None:
            raise BadInput("the tokenizer has neither a padding nor an end-of-sequence token to pad with")
        needed = len(self._prefix) + len(self._suffix) + 1
        if self._config.max_length < needed:
            raise BadInput(
                f"train.max_length is {self._config.max_length}, but with the tokenizer's special tokens it must be at "
                f"least {needed}"
            )
