"""Prompts and answers in a tokenizer's own chat template."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from cl_dist.config.objectives import ObjectiveName
from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput
from cl_dist.models.builtin import byte_tokenizer
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.template import DATE_CODES, with_frozen_clock
from cl_dist.tasks.types import IGNORE, Example, Kind, Task
from tests.tasks.tiny_tokenizers import sentencepiece_like

CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Turns in a frame, the end-of-sequence token behind each, as SmolLM2 and Qwen have it."""
WITHOUT_END = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
REFUSING = "{{ raise_exception('only even turns') }}"
THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<hm>{% endif %}{{ m['role'] }}:{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:!{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML) -> Any:
    """A byte tokenizer with a chat template."""
    tokenizer = byte_tokenizer("decoder")
    tokenizer.chat_template = template
    return tokenizer


def encoder(
    tokenizer: Any, objective: ObjectiveName = "causal_lm", labels: tuple[str, ...] = (), **train: Any
) -> Encoder:
    return Encoder(tokenizer, objective, TrainConfig(template="chat", **train), labels)


def one_sample(prompt: str, answer: str, kind: Kind = "generation") -> Task:
    return Task("t", kind, [Example(prompt, answer)], [])


def conversation(tokenizer: Any, prompt: str, answer: str) -> list[int]:
    """What transformers itself makes of the two turns, up to the end of the answer."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    ids: list[int] = tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False)
    return ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]


@pytest.mark.parametrize("prompt", ["What is it?", "  spaced  ", "\nlines\n\nof text", "a", "user\na"])
def test_a_sample_is_the_conversation_with_the_loss_on_the_answer(prompt: str) -> None:
    tokenizer = chat_tokenizer()
    (sample,) = encoder(tokenizer).train(one_sample(prompt, "It is good."))
    assert sample.input_ids == conversation(tokenizer, prompt, "It is good.")
    learnt = [label for label in sample.labels if label != IGNORE]
    assert tokenizer.decode(learnt) == "It is good.</s>"
    assert sample.labels[-len(learnt) :] == learnt


def test_evaluation_uses_the_same_prompts_as_training() -> None:
    tokenizer = chat_tokenizer()
    encode = encoder(tokenizer, labels=("yes", "no"))
    turn = [{"role": "user", "content": " Well? "}]
    asked = tokenizer.apply_chat_template(turn, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert encode.prompt_ids(" Well? ") == asked
    (sample,) = encode.train(one_sample(" Well? ", "yes"))
    assert sample.input_ids == asked + encode.answer_ids("yes")
    assert tokenizer.decode(encode.answer_ids("yes")) == "yes</s>"


def test_a_prompt_that_is_too_long_is_cut_inside_its_turn() -> None:
    tokenizer = chat_tokenizer()
    (sample,) = encoder(tokenizer, max_length=60, max_target_length=10).train(one_sample("x" * 99 + "y" * 99, "z"))
    text = tokenizer.decode(sample.input_ids)
    assert len(sample.input_ids) == 60
    assert text.startswith("<s>user\nxx")
    assert text.endswith("yy</s>\n<s>assistant\nz</s>")
    assert text.count("x") - text.count("y") in (0, 1)


def test_the_end_token_is_added_to_a_turn_without_one() -> None:
    tokenizer = chat_tokenizer(WITHOUT_END)
    ids = encoder(tokenizer).answer_ids("sure")
    assert tokenizer.decode(ids) == "[assistant] sure\n</s>"


TURNS = "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}\n{% else %}ANSWER{% endif %}{% endfor %}"
ASKING = TURNS + "{% if add_generation_prompt %}CUE{% endif %}"
CONTENT = "{{ m.content }}"


def turns(answer: str, cue: str | None = "<a>") -> str:
    """A template that writes the assistant's turn so, and asks for it with `cue` where there is one."""
    text = TURNS if cue is None else ASKING.replace("CUE", cue)
    return text.replace("ANSWER", answer)


def marking_tokenizer(template: str, end: str = "</s>") -> Any:
    """A byte tokenizer that knows the templates' marks, of which `<end>` is special; `end` is its end of sequence."""
    tokenizer = chat_tokenizer(template)
    tokenizer.add_tokens(["<think>", "</think>", "<u>", "<a>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.eos_token = end
    return tokenizer


ADDING = [  # template, what it puts before an answer and does not ask with, what it puts behind
    (turns(f"<a>\n<think>\n\n</think>\n\n{CONTENT}<end>\n", "<a>\n"), "<think>\n\n</think>\n\n", "<end>\n"),  # as Qwen3
    (
        turns(f"<a><think>\n\n</think>\n\n{CONTENT}<end>", "<a><think>\n"),
        "\n</think>\n\n",
        "<end>",
    ),  # its thinking kind
    (turns(f"<a>final: {CONTENT}<end>"), "final: ", "<end>"),  # as gpt-oss
    (turns(f"<a>\n{CONTENT}<end>\n", None), "<a>\n", "<end>\n"),  # asks with nothing
    (turns(f"<a> {CONTENT} <end>"), " ", " <end>"),  # as Llama 2 and Mistral
    (turns(f"<a>\n{CONTENT}<end>\n", "<a>\n"), "", "<end>\n"),  # as Gemma and Llama 3
    (turns(f"<a>{CONTENT} [over]\n"), "", " [over]\n"),
]


@pytest.mark.parametrize("end", ["<end>", "</s>"])
@pytest.mark.parametrize(("template", "lead", "tail"), ADDING)
@pytest.mark.parametrize("answer", ["good", "a good one.", "7", "\u00e4\u00f6", "1\n2", "\n"])
def test_what_a_template_adds_to_an_answer_is_not_scored(
    template: str, lead: str, tail: str, answer: str, end: str
) -> None:
    tokenizer = marking_tokenizer(template, end)
    encode = encoder(tokenizer, labels=("good", "bad"))
    asked, whole = rendered(tokenizer, "What?"), rendered(tokenizer, "What?", answer)
    # What is learnt is the template's own rendering, up to the end of the sequence.
    (sample,) = encode.train(one_sample("What?", answer))
    learnt = tokenizer.decode([label for label in sample.labels if label != IGNORE])
    assert tokenizer.decode(sample.input_ids) == asked + learnt
    assert whole.startswith(asked + learnt.removesuffix(end))
    assert learnt.startswith(lead + answer)
    # What is scored is the answer alone, behind all that comes before it, and the first token behind it.
    assert tokenizer.decode(encode.prompt_ids("What?")) == asked + lead
    scored = encode.scored_ids(answer)
    assert tokenizer.decode(scored[:-1]) == answer
    assert (tail + end).startswith(tokenizer.decode(scored[-1:]))
    assert sample.input_ids[: len(encode.prompt_ids("What?")) + len(scored)] == encode.prompt_ids("What?") + scored
    # What a model that has learnt it writes is the answer.
    assert encode.answer_text(sample.input_ids[len(encode.prompt_ids("What?")) :]) == answer.strip()


def rendered(tokenizer: Any, prompt: str, answer: str | None = None) -> str:
    """The template's rendering by transformers itself, of the question alone or with its answer."""
    turns = [{"role": "user", "content": prompt}]
    if answer is None:
        return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    return str(tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False))


def test_a_token_that_ends_a_turn_ends_an_answer() -> None:
    gemma = turns(f"<a>\n{CONTENT}<end>\n", "<a>\n")
    both = encoder(marking_tokenizer(gemma, "</s>"))
    tokenizer = marking_tokenizer(gemma)
    assert both.stops == tokenizer.convert_tokens_to_ids(["</s>", "<end>"])
    assert encoder(marking_tokenizer(gemma, "<end>")).stops == tokenizer.convert_tokens_to_ids(["<end>"])
    assert encoder(chat_tokenizer(WITHOUT_END)).stops == [chat_tokenizer().eos_token_id]


@pytest.mark.parametrize(
    ("tail", "written", "answer"),
    [
        (" [over]\n", "yes [over]\nno [over]", "yes"),
        (" [over]\n", "yes", "yes"),
        (".", "3.5 m.", "3.5 m"),
        ("\n", "two\nlines\n", "two\nlines"),
    ],
)
def test_words_after_an_answer_are_cut_off(tail: str, written: str, answer: str) -> None:
    tokenizer = marking_tokenizer(turns(f"<a>{CONTENT}{tail}"))
    assert encoder(tokenizer).answer_text(tokenizer(written, add_special_tokens=False)["input_ids"]) == answer


def test_an_answer_whose_first_token_merges_with_the_text_before_it() -> None:
    """A tokenizer with the blank in its words: the blank that the template puts before an answer is the answer's."""
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = "{% for m in messages %}: {{ m.content }}{% endfor %}"
    encode = encoder(tokenizer)
    yes, end = tokenizer.convert_tokens_to_ids(["\u2581yes", "</s>"])
    assert encode.scored_ids("yes") == [yes, end]
    (sample,) = encode.train(one_sample("question", "yes"))
    assert sample.input_ids[-2:] == [yes, end]
    assert encode.prompt_ids("question") == sample.input_ids[:-2]


def test_probes_that_the_vocabulary_lacks_are_not_taken_for_the_template() -> None:
    tokenizer = sentencepiece_like()
    tokenizer.chat_template = "{% for m in messages %}: {{ m.content }}{% endfor %}"
    encode = encoder(tokenizer, labels=("yes", "question"))
    assert encode.scored_ids("yes") != encode.scored_ids("question")
    assert len(encode.scored_ids("question")) == 2


DATED = "{{- strftime_now('%d %b %Y') }}|{% for m in messages %}{{ m.content }}{% endfor %}"


class NextYear(datetime):
    """A clock that says another day."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls(2031, 1, 2, 3, 4, 5)


def test_a_prompt_does_not_depend_on_the_day(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = chat_tokenizer(DATED)
    before = encoder(tokenizer).prompt_ids("Hello")
    monkeypatch.setattr(chat_template_utils, "datetime", NextYear)
    assert encoder(tokenizer).prompt_ids("Hello") == before
    assert tokenizer.decode(before) == "26 Jul 2024|Hello"
    assert tokenizer.decode(encoder(tokenizer, date="2031-01-02").prompt_ids("Hello")) == "02 Jan 2031|Hello"


@pytest.mark.parametrize("start", ["", "\n", "  \n ", "\n  {% if true %}", "  {%- if true %}x"])
def test_the_frozen_clock_writes_what_strftime_does(start: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And changes nothing else: white space before a template is part of what it writes, or not."""
    monkeypatch.setattr(chat_template_utils, "datetime", Midnight)
    codes = " | ".join(f"<{code}>" for code in DATE_CODES)
    text = f"{start}A {{{{ strftime_now('{codes}') }}}} b{'{% endif %}' if 'if' in start else ''}\n"
    tokenizer = chat_tokenizer(text)
    expected = rendered(tokenizer, "x")
    assert "<Thursday>" in expected
    tokenizer.chat_template = with_frozen_clock(text, "2031-01-02")
    assert rendered(tokenizer, "x") == expected


class Midnight(datetime):
    """The start of a day."""

    @classmethod
    def now(cls, tz: Any = None) -> datetime:
        return cls(2031, 1, 2)


def test_text_has_no_chat_template() -> None:
    tokenizer = chat_tokenizer()
    (chunk,) = encoder(tokenizer).train(one_sample("", "just text", kind="text"))
    assert tokenizer.decode(chunk.input_ids) == "<s>just text</s>"


@pytest.mark.parametrize(
    ("tokenizer", "objective", "message"),
    [
        (chat_tokenizer(None), "causal_lm", "needs a chat template, and the tokenizer of"),
        (chat_tokenizer(REFUSING), "causal_lm", "fails: only even turns"),
        (byte_tokenizer("encoder-decoder"), "seq2seq_lm", "chat is for decoders, but the model's objective is seq2seq"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer: Any, objective: ObjectiveName, message: str) -> None:
    with pytest.raises(BadInput, match=r"^train.template: chat") as raised:
        encoder(tokenizer, objective)
    assert message in str(raised.value)


def test_an_assistant_turn_that_does_not_begin_with_the_cue() -> None:
    with pytest.raises(BadInput, match="does not begin with what asks for it"):
        encoder(chat_tokenizer(THINKING)).answer_ids("yes")


@pytest.mark.parametrize("cue", ["<think>\n", "<end>"])  # as DeepSeek-R1; the latter shares a letter with an answer
def test_text_that_only_the_question_has_is_left_out(cue: str) -> None:
    lead = "<" if cue == "<end>" else ""
    tokenizer = marking_tokenizer(turns(f"<a>{lead}{CONTENT}<end>", f"<a>{cue}"), "<end>")
    encode = encoder(tokenizer, labels=("good", "bad"))
    assert encode.unanswered_cue == cue
    assert tokenizer.decode(encode.prompt_ids("What?")) == f"<u>What?\n<a>{lead}"
    (sample,) = encode.train(one_sample("What?", "good"))
    whole = f"<u>What?\n<a>{lead}good<end>"
    assert tokenizer.decode(sample.input_ids) == rendered(tokenizer, "What?", "good") == whole
    assert encoder(marking_tokenizer(turns(f"<a>{CONTENT}<end>"))).unanswered_cue == ""
