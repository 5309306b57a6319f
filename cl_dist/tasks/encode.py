"""From prompts and answers to token ids, under each training objective. Imports no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

from cl_dist.config.objectives import FACTS, ObjectiveName
from cl_dist.config.schema import TrainConfig
from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.heartbeat import beat
from cl_dist.tasks.conversations import ConversationEncoder
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.samples import Samples, pack, whole
from cl_dist.tasks.template import AnswerParts, ChatTemplate, cut
from cl_dist.tasks.types import Encoded, Example, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

logger = logging.getLogger(__name__)

ENCODING = 1
"""Version of what this module, `template` and `objectives` make of a sample. Raise it with every change of the ids, so
that no cache is stale."""
_AT_ONCE = 2_000
"""Samples that are tokenised together: enough to keep a fast tokenizer busy, few enough for short-lived lists."""
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
        self._labels: dict[str, AnswerParts] = {}
        self._prefix, self._suffix = self._objective.frame(*find_special_tokens(tokenizer))
        self._around_text = (self._prefix, self._suffix)
        self._template = self._chat_template()
        self._lead: list[int] = []
        if self._template is not None:
            self._prefix, self._suffix = self._template.head, self._template.cue
            self._lead = self._template.lead
        self._check_tokenizer()
        self._reserve = min(train.max_target_length, train.max_length // 2)
        if label_names and self._facts.generates:
            parts = self._answer_parts(label_names)
            self._reserve = max(len(self._fitting_answer(parts[each].ids, f"label {each!r}")) for each in label_names)

    @property
    def _conversations(self) -> ConversationEncoder:
        # Without a chat template, `load_stream` has made a sample of every answer.
        assert self._template is not None
        return ConversationEncoder(self._template, self._config, self._training_answer)

    def identity(self) -> dict[str, Any] | None:
        """Everything but the texts that decides the ids, as a JSON value.

        None if the tokenizer does not show everything that it is made of: then nobody can say whether ids are stale.
        """
        tokenizer = _tokenizer_identity(self._tokenizer)
        if tokenizer is None:
            return None
        config = self._config
        return {
            "encoding": ENCODING,
            "tokenizer": tokenizer,
            "objective": self._objective.name,
            "lengths": [config.max_length, config.max_target_length, self._reserve],
            "cuts": [config.truncate, config.long_answers],
            "around": [self._prefix, self._suffix, self._lead, *self._around_text],
            "template": None if self._template is None else self._template.identity,
            "classes": None if self._facts.generates else list(self._class_of),
            "libraries": {name: version(name) for name in ("transformers", "tokenizers")},
        }

    @property
    def unanswered_cue(self) -> str:
        """Text that the chat template adds to a question but not to an answered turn. Prompts leave it out."""
        return "" if self._template is None else self._template.unanswered

    @property
    def pad_id(self) -> int:
        """Id to pad with: the tokenizer's padding token, or its end-of-sequence token if it has none."""
        pad = self._tokenizer.pad_token_id
        return int(pad if pad is not None else self._tokenizer.eos_token_id)

    @property
    def objective(self) -> ObjectiveName:
        """What the samples are encoded for."""
        return self._objective.name

    def text(self, ids: Sequence[int]) -> str:
        """The text of some ids, special tokens included."""
        return str(self._tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))

    def each_length(self, task: Task) -> Iterator[tuple[int, list[int], bool]]:
        """Of each training sample: tokens of its prompt with what stands around it, those of its answers, both before
        anything is cut, and whether `max_length` cuts the prompt.
        """
        if task.kind == "text":
            for _, some in _pieces(task.train):
                yield from ((0, [len(ids)], False) for ids in self._tokenize([each.answer for each in some]))
            return
        taken = len(self._prefix) + len(self._suffix)
        for _, some in _pieces(task.train):
            prompts = self._tokenize_prompts([_question(example) for example in some])
            wanted = chain.from_iterable(map(answers_of, some)) if self._facts.generates else ()
            answers = self._answer_parts(list(dict.fromkeys(wanted)))
            for prompt, example in zip(prompts, some, strict=True):
                own = [len(answers[each].ids) for each in answers_of(example)] if self._facts.generates else []
                if example.turns:
                    before, learnt = self._conversations.lengths(example.turns)
                    yield before, own, before + learnt > self._config.max_length
                    continue
                most = self._config.max_length - (min(own[0], self.answer_room) if self._facts.answer_in_prompt else 0)
                yield taken + len(prompt), own, taken + len(prompt) > most

    def check(self, task: Task) -> None:
        """Raise BadInput for training data that `train` would refuse, without tokenising the prompts.

        With `long_answers: cut`, logs how many answers will be cut.
        """
        check_kind(task, self._objective.name)
        if task.kind == "text":
            if next(self.each_chunk(task.train), None) is None:
                raise BadInput(f"task {task.name!r}: the training text is too short to predict any token")
            return
        if not self._facts.generates:
            return
        if any(example.turns for example in task.train):
            self._conversations.check(task)
        cuts = 0
        for first, some in _pieces(task.train):
            answers = self._answer_parts(list(dict.fromkeys(chain.from_iterable(map(answers_of, some)))))
            for index, example in enumerate(some, first):
                lengths = [len(answers[answer].ids) for answer in answers_of(example)]
                cuts += any(length > self.answer_room for length in lengths)
                for answer in answers_of(example):
                    self._training_answer(answers[answer].ids, _place(task, index))
        if cuts and self._config.long_answers == "cut":
            logger.warning(
                "task %r: %d of %d training answers are cut to %d tokens (train.long_answers)",
                task.name,
                cuts,
                len(task.train),
                self.answer_room,
            )

    def train(self, task: Task) -> Samples:
        """The task's training samples in file order, or the chunks of a plain text.

        Raises BadInput, which names the sample, for an answer that is too long (unless `long_answers: cut`), or if the
        objective cannot learn this kind of task.
        """
        return whole(pack(self.each_training_sample(task)))

    def each_training_sample(self, task: Task) -> Iterator[Encoded]:
        """The samples of `train`, one by one."""
        check_kind(task, self._objective.name)
        if task.kind == "text":
            yield from self.each_chunk(task.train)
            return
        for first, some in _pieces(task.train):
            prompts = self._tokenize_prompts([_question(example) for example in some])
            answers = self._answers_to(some) if self._facts.generates else {}
            for index, (prompt, example) in enumerate(zip(prompts, some, strict=True), first):
                if example.turns:
                    yield self._conversations.sample(index, example.turns, _place(task, index))
                    continue
                if self._facts.generates:
                    target = self._training_answer(answers[example.answer].ids, _place(task, index))
                else:
                    target = [self._class_of[example.answer]]
                yield self._objective.sample(index, self._framed(prompt, len(target)), target)

    def text_chunks(self, documents: Sequence[Example]) -> Samples:
        """The chunks of `each_chunk`."""
        return whole(pack(self.each_chunk(documents)))

    def each_chunk(self, documents: Sequence[Example]) -> Iterator[Encoded]:
        """Join documents and cut them into chunks of at most `max_length` tokens, including special tokens.

        The labels are the ids, with IGNORE for the special tokens that start or end a chunk and for a decoder's first
        token. For `masked_lm`, they mark the tokens that `mask_tokens` may mask. Chunks without labels are left out.
        """
        ends = self._objective.document_end(self._tokenizer.eos_token_id)
        prefix, suffix = self._around_text
        room = self._config.max_length - len(prefix) - len(suffix)
        number, stream = 0, list[int]()
        for first, some in _pieces(documents):
            for ids in self._tokenize([document.answer for document in some]):
                stream += [*ids, *ends]
            # The rest of the stream goes on with the next documents; the last chunk of all may be short.
            last = first + len(some) == len(documents)
            usable = len(stream) if last else len(stream) - len(stream) % room
            for start in range(0, usable, room):
                chunk = self._objective.chunk(number, prefix, stream[start : min(start + room, usable)], suffix)
                number += 1
                if chunk.targets:
                    yield chunk
            stream = stream[usable:]

    def each_prompt(self, task: Task) -> Iterator[Encoded]:
        """`prompt_ids` of the task's evaluation samples, as samples without labels."""
        for first, some in _pieces(task.evaluation):
            prompts = self._tokenize_prompts([_question(example) for example in some])
            for index, (prompt, example) in enumerate(zip(prompts, some, strict=True), first):
                if example.turns:
                    ids = self._conversations.history(example.turns, self._reserve)
                else:
                    ids = self._framed(prompt, self._reserve)
                yield Encoded(index, ids + self._lead, [])

    def prompt_ids(self, prompt: str, answer_length: int | None = None) -> list[int]:
        """Ids of a prompt from which a model continues in evaluation, cut to `max_length`.

        They include the tokenizer's special tokens or its chat template, also what the template puts before every
        answer. A decoder's prompt leaves room for an answer of `answer_length` tokens; by default, that is the stream's
        longest label or, without labels, the longest allowed answer, at most half of `max_length`.
        """
        (ids,) = self._tokenize_prompts([prompt])
        return self._framed(ids, self._reserve if answer_length is None else answer_length) + self._lead

    @property
    def longest_prompt(self) -> int:
        """Most ids that `prompt_ids` returns for any prompt."""
        taken = self._reserve if self._facts.answer_in_prompt else 0
        return max(self._config.max_length - taken, len(self._prefix) + len(self._suffix)) + len(self._lead)

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
        return self._generated(self._parts(answer))

    def each_generated(self, answers: Sequence[str]) -> Iterator[list[int]]:
        """`generated_ids` of each answer, tokenised together."""
        for _, some in _pieces(answers):
            found = self._answer_parts(some)
            yield from (self._generated(found[answer]) for answer in some)

    def _generated(self, parts: AnswerParts) -> list[int]:
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
        return self._answer_parts([answer])[answer]

    def _answers_to(self, examples: Sequence[Example]) -> dict[str, AnswerParts]:
        return self._answer_parts(list(dict.fromkeys(example.answer for example in examples)))

    def _answer_parts(self, answers: Sequence[str]) -> dict[str, AnswerParts]:
        """The parts of each answer. Only those of labels are kept, because they are few and asked for often."""
        known = {answer: self._labels[answer] for answer in answers if answer in self._labels}
        new = [answer for answer in answers if answer not in known]
        if not new:
            return known
        if self._template is not None:
            parts = self._template.answers(new)
        else:
            end = int(self._tokenizer.eos_token_id)
            parts = [AnswerParts([], ids, [end]) for ids in self._bare_answers(new)]
        found = dict(zip(new, parts, strict=True))
        self._labels.update((answer, each) for answer, each in found.items() if answer in self._class_of)
        return {**known, **found}

    def _bare_answers(self, answers: Sequence[str]) -> list[list[int]]:
        if self._facts.answer_apart:
            return self._tokenize(answers)
        # A decoder's answer follows a prompt and a space, and many tokenizers merge the space with the first word.
        anchored = self._tokenize([f"{ANCHOR} {answer}" for answer in answers])
        (anchor,) = self._tokenize([ANCHOR])
        bare: list[list[int]] = []
        for answer, ids in zip(answers, anchored, strict=True):
            if not answer:  # otherwise the space between prompt and answer would remain
                bare.append([])
            elif ids[: len(anchor)] == anchor:
                bare.append(ids[len(anchor) :])
            else:
                bare += self._tokenize([f" {answer}"])
        return bare

    def _framed(self, prompt: list[int], answer_length: int) -> list[int]:
        """The prompt between its special tokens, cut to fit `max_length`; for a decoder, together with its answer."""
        taken = len(self._prefix) + len(self._suffix) + (answer_length if self._facts.answer_in_prompt else 0)
        room = max(self._config.max_length - taken, 0)
        return self._prefix + cut(prompt, room, self._config.truncate) + self._suffix

    def _training_answer(self, ids: list[int], where: str) -> list[int]:
        """The ids of a sample's answer. If they are too many, `long_answers` decides between an error and a cut."""
        room = self.answer_room
        if self._config.long_answers == "error" or len(ids) <= room or room < 1:
            return self._fitting_answer(ids, where)
        return [*ids[: room - 1], ids[-1]]

    @property
    def answer_room(self) -> int:
        """Most tokens of an answer. A decoder needs room for at least one token of the prompt too."""
        if not self._facts.answer_in_prompt:
            return self._config.max_target_length
        room = self._config.max_length - len(self._prefix) - len(self._suffix) - 1
        return min(self._config.max_target_length, room)

    def _fitting_answer(self, ids: list[int], where: str) -> list[int]:
        """The ids of an answer. Raises BadInput, which starts with `where`, if the settings do not allow so many."""
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
        for _, some in _pieces(texts):
            encoded += self._tokenizer(list(some), add_special_tokens=False, verbose=False)["input_ids"]
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


def _pieces(items: Sequence[T]) -> Iterator[tuple[int, Sequence[T]]]:
    """Consecutive pieces of a sequence, each with the place where it starts."""
    for start in range(0, len(items), _AT_ONCE):
        yield start, items[start : start + _AT_ONCE]


def answers_of(example: Example) -> tuple[str, ...]:
    """What a model learns to say in a sample: its answer, or every answer of a conversation."""
    return tuple(turn.content for turn in example.turns if turn.role == "assistant") or (example.answer,)


def _question(example: Example) -> str:
    """The prompt; nothing for a conversation, which is tokenised as a whole."""
    return "" if example.turns else example.prompt


def _place(task: Task, index: int) -> str:
    return f"task {task.name!r}, training sample {index}"


def _tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> list[str] | None:
    """A tokenizer's content, whatever files it came from; None for one that runs Python code, which may do anything."""
    kind = type(tokenizer)
    if not tokenizer.is_fast or not kind.__module__.startswith("transformers."):
        return None
    try:
        backend = str(tokenizer.backend_tokenizer.to_str())
    except Exception:  # the Rust library raises it for components that are written in Python
        return None
    # Names and paths say where the tokenizer was, not what it is.
    settings = {key: value for key, value in tokenizer.init_kwargs.items() if "file" not in key and "path" not in key}
    return [kind.__qualname__, backend, json.dumps(settings, sort_keys=True, default=repr)]
