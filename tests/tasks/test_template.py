"""Prompts and answers in a tokenizer's own chat template."""

from __future__ import annotations

from typing import Any

import pytest

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput
from cl_dist.models.builtin import byte_tokenizer
from cl_dist.tasks.encode import Encoder, Objective
from cl_dist.tasks.types import IGNORE, Example, Kind, Task

CHATML = (
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] | trim }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Turns in a frame, the end-of-sequence token behind each, as SmolLM2 and Qwen have it."""
WITHOUT_END = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}"
REFUSING = "{{ raise_exception('only even turns') }}"
THINKING = (
    "{% for m in messages %}{{ m['role'] }}:{% if m['role'] == 'assistant' %}<hm>{% endif %}{{ m['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:!{% endif %}"
)


def chat_tokenizer(template: str | None = CHATML) -> Any:
    """A byte tokenizer with a chat template."""
    tokenizer = byte_tokenizer("decoder")
    tokenizer.chat_template = template
    return tokenizer


def encoder(tokenizer: Any, objective: Objective = "causal_lm", labels: tuple[str, ...] = (), **train: Any) -> Encoder:
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


def test_evaluation_asks_as_training_did() -> None:
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


def test_the_end_token_is_put_behind_a_turn_without_one() -> None:
    tokenizer = chat_tokenizer(WITHOUT_END)
    ids = encoder(tokenizer).answer_ids("sure")
    assert tokenizer.decode(ids) == "[assistant] sure\n</s>"


def test_text_is_no_conversation() -> None:
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
def test_templates_that_cannot_be_used(tokenizer: Any, objective: Objective, message: str) -> None:
    with pytest.raises(BadInput, match=r"^train.template: chat") as raised:
        encoder(tokenizer, objective)
    assert message in str(raised.value)


def test_an_assistant_that_does_not_begin_as_asked_for() -> None:
    with pytest.raises(BadInput, match="does not begin with what asks for it"):
        encoder(chat_tokenizer(THINKING)).answer_ids("yes")
