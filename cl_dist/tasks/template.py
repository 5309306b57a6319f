"""Prompts and answers as the turns of a conversation, in the chat template that comes with a tokenizer.

The token ids are those that the template's own rendering has as a whole. What it puts before and behind every prompt is
found by comparing renderings, so that a prompt that is too long can be cut without cutting the template.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cl_dist.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("a", "Zq", "7.")
"""Prompts that share no start and no end: what their renderings share is the template's."""

SETTING = "train.template: chat"


def no_chat_template(name: str) -> BadInput:
    """The error for a model whose tokenizer has no template."""
    return BadInput(f"{SETTING} needs a chat template, and the tokenizer of {name} has none; use a chat model, or none")


class ChatTemplate:
    """One tokenizer's template: a user's turn that asks, and the assistant's that answers.

    Raises BadInput where the tokenizer has no template, or one that cannot be used for training.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise no_chat_template(tokenizer.name_or_path)
        self._tokenizer = tokenizer
        probes = [self._ids(self.user_turn(probe)) for probe in PROBES]
        self.head = _common_start(probes)
        """Ids before every prompt."""
        self.cue = _common_start([ids[len(self.head) :][::-1] for ids in probes])[::-1]
        """Ids behind every prompt, the start of the assistant's turn among them."""

    def user_turn(self, prompt: str) -> str:
        """The text that the model answers."""
        return self._render([{"role": "user", "content": prompt}], add_generation_prompt=True)

    def bare(self, ids: list[int]) -> list[int]:
        """A prompt's own ids out of those of its turn; none where they have grown together with the template's."""
        end = len(ids) - len(self.cue)
        whole = ids[: len(self.head)] == self.head and ids[end:] == self.cue
        return ids[len(self.head) : end] if whole else []

    def answer_ids(self, answer: str) -> list[int]:
        """Ids of the assistant's turn behind the cue, up to and with the end-of-sequence token, which ends generation;
        where the template has none there, it is put behind.
        """
        asked = self.user_turn(PROBES[0])
        turns = [{"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": answer}]
        told = self._render(turns)
        if not told.startswith(asked):
            raise BadInput(
                f"{SETTING}: in the template of {self._tokenizer.name_or_path} the assistant's turn does not begin "
                "with what asks for it, so prompts and answers cannot be put together; use none"
            )
        before, whole = self._ids(asked), self._ids(told)
        ids = whole[len(before) :] if whole[: len(before)] == before else self._ids(told[len(asked) :])
        end = int(self._tokenizer.eos_token_id)
        return [*ids[: ids.index(end)], end] if end in ids else [*ids, end]

    def _render(self, turns: list[dict[str, str]], **options: Any) -> str:
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, **options))
        except Exception as error:  # jinja's own, and whatever a template raises on purpose
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadInput(f"{SETTING}: the template of {self._tokenizer.name_or_path} fails: {reason}") from error

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def _common_start(rows: Sequence[Sequence[int]]) -> list[int]:
    """What all rows begin with."""
    start: list[int] = []
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        start.append(column[0])
    return start
