"""Conversations: what is read, what a model learns from them, and what is refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput
from cl_dist.models.builtin import byte_tokenizer
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.tokenised import TokenisedData
from cl_dist.tasks.types import IGNORE, Encoded, Task
from tests.tasks.data import as_lines, load_one, write_lines
from tests.tasks.test_bad_data import refuse
from tests.tasks.test_template import CHATML, WITHOUT_END, chat_tokenizer

CHAT = TrainConfig(template="chat")
LAST_ONLY = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{% if m['role'] == 'assistant' and loop.last %}<hm></hm>{% endif %}"
    "{{ m['content'] }}</s>\n{% endfor %}{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
"""Puts something before the last answer only, as Qwen3 does."""


def say(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    """Messages of user and assistant in turn."""
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(texts)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def load(folder: Path, *conversations: Any, train: TrainConfig = CHAT, **task: Any) -> Task:
    write_lines(folder / "talks.jsonl", as_lines([{"messages": messages} for messages in conversations]))
    return load_one(folder, path="talks", train=train, **task)


def learnt(tokenizer: Any, sample: Encoded) -> list[str]:
    """The stretches with a loss, as text."""
    found: list[list[int]] = []
    before = IGNORE
    for label, token in zip(sample.labels, sample.input_ids, strict=True):
        assert label in (IGNORE, token)
        if label != IGNORE:
            found = found if before != IGNORE else [*found, []]
            found[-1].append(label)
        before = label
    return [tokenizer.decode(stretch) for stretch in found]


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHATML, ["Hello!</s>", "Fine.</s>"]),
        ("builtin", ["Hello!</s>", "Fine.</s>"]),
        (WITHOUT_END, ["[assistant] Hello!\n", "[assistant] Fine.\n</s>"]),  # which asks for no answer
    ],
)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_conversation_is_one_sample_with_the_loss_on_every_answer(
    tmp_path: Path, template: str, answers: list[str], system: str | None
) -> None:
    messages = say("Hi", "Hello!", "And you?", "Fine.", system=system)
    task = load(tmp_path, messages)
    tokenizer = byte_tokenizer("decoder") if template == "builtin" else chat_tokenizer(template)
    (sample,) = Encoder(tokenizer, "causal_lm", CHAT, ()).train(task)
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    length = min(len(whole), len(sample.input_ids))
    assert sample.input_ids[:length] == whole[:length]
    assert abs(len(sample.input_ids) - len(whole)) <= 1, "a line end behind the last answer, or its end"
    assert learnt(tokenizer, sample) == answers


def test_evaluation_asks_for_every_answer_after_the_turns_of_the_data(tmp_path: Path) -> None:
    messages = say("Hi", "Hello!", "And you?", "Fine.", system="Be brief.")
    task = load(tmp_path, messages)
    tokenizer = chat_tokenizer()
    encoder = Encoder(tokenizer, "causal_lm", CHAT, ())
    prompts = [each.input_ids for each in encoder.each_prompt(task)]
    for prompt, turns in zip(prompts, (messages[:2], messages[:4]), strict=True):
        options = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
        assert prompt == tokenizer.apply_chat_template(turns, **options)
    assert [example.answer for example in task.evaluation] == ["Hello!", "Fine."]
    (sample,) = encoder.train(task)
    assert sample.input_ids == prompts[1] + encoder.answer_ids("Fine."), "training continues the same prompt"


def test_one_question_and_its_answer_are_the_sample_that_they_always_were(tmp_path: Path) -> None:
    task = load(tmp_path, say("Hi", "Hello!"))
    write_lines(tmp_path / "plain.jsonl", as_lines([{"input": "Hi", "output": "Hello!"}]))
    assert task.train == load_one(tmp_path, path="plain").train


def test_without_a_chat_template_every_answer_is_a_sample(tmp_path: Path) -> None:
    talk = say("Hi", "Hello!", "And you?", "Fine.")
    task = load(tmp_path, talk, say("Well?", "Yes.", system="Be brief."), train=TrainConfig())
    assert [(example.prompt, example.answer, example.turns) for example in task.train] == [
        ("Hi", "Hello!", ()),
        ("User: Hi\nAssistant: Hello!\nUser: And you?\nAssistant:", "Fine.", ()),
        ("Be brief.\n\nWell?", "Yes.", ()),
    ]
    assert task.kind == "generation"
    encoder = Encoder(byte_tokenizer("encoder-decoder"), "seq2seq_lm", TrainConfig(), ())
    assert len(encoder.train(task)) == 3


def test_a_conversation_that_is_too_long_loses_its_oldest_exchanges(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    messages = say("a" * 40, "one", "b" * 40, "two", "c" * 40, "three", system="S")
    task = load(tmp_path, messages, say("d" * 300, "four", system="S"), say("e", "f"))
    train = TrainConfig(template="chat", max_length=160, max_target_length=20)
    tokenizer = chat_tokenizer()
    encoder = Encoder(tokenizer, "causal_lm", train, ())
    encoder.check(task)
    assert "2 of 3 training samples are conversations of more than 160 tokens (train.max_length)" in caplog.text
    first, second, _ = encoder.train(task)
    kept = tokenizer.apply_chat_template([messages[0], *messages[3:]], tokenize=True, return_dict=False)
    assert first.input_ids == kept[: len(first.input_ids)]
    assert learnt(tokenizer, first) == ["two</s>", "three</s>"]
    assert len(second.input_ids) == 160
    text = tokenizer.decode(second.input_ids)
    assert text.startswith("<s>system\nS</s>\n<s>user\nddd")
    assert text.endswith("ddd</s>\n<s>assistant\nfour</s>")
    for prompt in encoder.each_prompt(task):
        assert len(prompt.input_ids) <= 160 - 20
        assert tokenizer.decode(prompt.input_ids).endswith("</s>\n<s>assistant\n")


def test_every_answer_of_a_conversation_is_checked_and_cut(tmp_path: Path) -> None:
    task = load(tmp_path, say("Hi", "x" * 30, "And?", "y"))
    limited = {"template": "chat", "max_target_length": 20}
    tokenizer = chat_tokenizer()
    encoder = Encoder(tokenizer, "causal_lm", TrainConfig(**limited), ())
    with pytest.raises(BadInput, match=r"sample 0: the answer takes 31 tokens, but train.max_target_length is 20"):
        encoder.check(task)
    (sample,) = Encoder(tokenizer, "causal_lm", TrainConfig(**limited, long_answers="cut"), ()).train(task)
    assert learnt(tokenizer, sample) == ["x" * 19 + "</s>", "y</s>"]


def test_a_template_that_changes_earlier_turns_is_refused(tmp_path: Path) -> None:
    task = load(tmp_path, say("Hi", "Hello!", "And you?", "Fine."))
    encoder = Encoder(chat_tokenizer(LAST_ONLY), "causal_lm", CHAT, ())
    with pytest.raises(BadInput, match=r"train.template: chat: .* renders earlier turns differently .*template: none"):
        encoder.check(task)
    encoder.check(load(tmp_path, say("Hi", "Hello!")))


def test_the_turns_decide_the_key_of_tokenised_data(tmp_path: Path) -> None:
    keys: list[str | None] = []

    def keep(key: str | None, encode: Any) -> Any:
        keys.append(key)
        from cl_dist.tasks.samples import pack

        return pack(encode())

    talk = say("Hi", "Hello!", "And you?", "Fine.")
    other = say("Hi", "Hello!\nUser: And you?", "x", "Fine.")
    data = TokenisedData(Encoder(chat_tokenizer(), "causal_lm", CHAT, ()), keep)
    for messages in (talk, other, talk):
        task = load(tmp_path, messages)
        data.train(task)
        data.prompts(task)
    assert keys[:2] == keys[4:]
    assert len(set(keys)) == 4


def test_held_out_conversations_share_no_turn_with_training(tmp_path: Path) -> None:
    talks = [say(f"question {number}", "a", f"more {number}", "b") for number in range(10)]
    for train, count in ((CHAT, 8), (TrainConfig(), 16)):
        task = load(tmp_path, *talks, train=train, eval_fraction=0.2)
        assert (len(task.train), len(task.evaluation)) == (count, 4)
        numbers = {example.prompt.split("question ")[1][0] for example in task.evaluation}
        assert not numbers & {example.prompt.split("question ")[1][0] for example in task.train}


def test_single_exchanges_with_a_system_prompt_can_be_classification(tmp_path: Path) -> None:
    talks = [say(f"text {number}", ("yes", "no")[number % 2], system="Is it?") for number in range(8)]
    task = load(tmp_path, *talks)
    assert (task.kind, task.labels) == ("classification", ("no", "yes"))


BROKEN: list[tuple[Any, str]] = [
    ("text", "field 'messages' must be a list of messages, not a string"),
    ([], "field 'messages' must be a list of messages, not an empty list"),
    (["Hi"], "message 0 must be an object with 'role' and 'content', not a string"),
    ([{"content": "Hi"}], "message 0: no field 'role'; the record has: content"),
    ([{"role": "user"}], "message 0: no field 'content'; the record has: role"),
    ([{"role": "user", "content": 3}], "message 0: 'content' must be a string, not a number"),
    (
        [{"role": "user", "content": [{"type": "text"}]}],
        "message 0: 'content', part 0: \"text\" is not allowed; allowed: {",
    ),
    (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
        "message 0: 'content', part 1: \"image_url\" is not allowed; allowed: {",
    ),
    ([{"role": "user", "content": ["a"]}], "message 0: 'content', part 0: a string is not allowed"),
    (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "because"}],
        "message 1: 'reasoning_content' is not allowed (it would not be learnt)",
    ),
    (
        [*say("a", "b"), {"role": "tool", "content": "c"}],
        'message 2: role "tool" is not allowed (tool calls cannot be le',
    ),
    (
        [{"role": "critic", "content": "c"}],
        'role "critic" is not allowed; allowed: system, developer, user, assistant, human',
    ),
    (
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "", "tool_calls": [1]}],
        "'tool_calls' is not al",
    ),
    ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}], "weight 0 is not allowed"),
    (say("a"), "the conversation must end with an answer, and its last turn is of the user"),
    (
        say("a", "b")[1:],
        "message 0 is of the assistant; allowed: a system prompt at the start, then user and assistant",
    ),
    ([*say("a", "b"), *say("c", "d", system="late")], "message 2 is of the system; allowed"),
    (say("a", " ", "c", "d"), "message 1: its text is empty"),
    (say("a", " "), "field 'messages' is empty; stream.empty_answers: keep"),
    ([{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}], 'message 1: from "bot" is not allowed'),
    (say("\ud800", "b"), "message 0 holds half a surrogate pair at character 0"),
]


@pytest.mark.parametrize(("messages", "problem"), BROKEN)
def test_broken_conversations_are_named(tmp_path: Path, messages: Any, problem: str) -> None:
    file = write_lines(tmp_path / "a.jsonl", as_lines([{"messages": say("a", "b")}, {"messages": messages}]))
    refuse(tmp_path, f"{file}, line 2: ", problem, path="a")


def test_texts_in_parts_and_developers(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b", "image_url": None}]
    answer = {"role": "assistant", "content": "c", "name": "bot", "weight": 1, "tool_calls": [], "refusal": None}
    made = [{"role": "developer", "content": "Be kind."}, {"role": "user", "content": parts}, answer]
    assert [(turn.role, turn.content) for turn in load(tmp_path, made).train[0].turns] == [
        ("system", "Be kind."),
        ("user", "a b"),
        ("assistant", "c"),
    ]


BESIDE: list[tuple[dict[str, Any], str]] = [
    ({"system": ["Be kind."]}, "field 'system' must be a string, not a list"),
    ({"tools": [{"type": "function"}]}, "field 'tools' is not allowed (tool calls cannot be learnt); leave it out"),
    ({"functions": '[{"name": "f"}]'}, "field 'functions' is not allowed"),
]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"instruction": "a", "input": "", "output": "b"},
    ],
)
def test_the_fields_beside_a_conversation(tmp_path: Path, record: dict[str, Any]) -> None:
    silent = {"system": " ", "tools": "[]", "functions": None}
    first, second = {**record, "id": 7}, {**record, "system": "Be kind.", "tools": []}
    write_lines(tmp_path / "a.jsonl", as_lines([first, {**record, **silent}, second]))
    task = load_one(tmp_path, path="a")
    assert [each.prompt for each in task.train] == ["a", "a", "Be kind.\n\na"]
    assert task.read_as.endswith("; not read: id")
    assert [len(each.turns) for each in load_one(tmp_path, path="a", train=CHAT).train] == [0, 0, 3]
    for extra, problem in BESIDE:
        write_lines(tmp_path / "b.jsonl", as_lines([first, {**record, **extra}]))
        refuse(tmp_path, "b.jsonl, line 2: ", problem, path="b")


def test_a_second_system_prompt_and_turns_beside_an_instruction_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", as_lines([{"messages": say("a", "b", system="c"), "system": "d"}]))
    refuse(tmp_path, "field 'system' is a second system prompt; the conversation starts with one", path="a")
    write_lines(tmp_path / "b.jsonl", as_lines([{"instruction": "a", "output": "b", "history": [["c", "d"]]}]))
    refuse(tmp_path, "field 'history' is not allowed; write such records as conversations (messages)", path="b")


def test_conversations_have_no_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    talks = [say("a", "yes", "b", "no")] * 4
    with caplog.at_level(logging.WARNING):
        assert load(tmp_path, *talks).kind == "generation"
    with pytest.raises(BadInput, match="labels are stated, but the task is generation"):
        load(tmp_path, *talks, labels=("yes", "no"))
