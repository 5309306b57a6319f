"""Tokenised data: made once, when it is needed, and identified by everything that decides it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput
from cl_dist.methods.shared.samples import past_samples
from cl_dist.state.digests import text_digest
from cl_dist.tasks import encode
from cl_dist.tasks.encode import Encoder
from cl_dist.tasks.samples import Table, pack
from cl_dist.tasks.tokenised import TokenisedData
from cl_dist.tasks.types import Encoded, Example, Task
from tests.tasks.tiny_tokenizers import characters

EXAMPLES = tuple(Example("q" * (1 + number % 7), "ab"[number % 2]) for number in range(20))
TASK = Task("t", "generation", EXAMPLES, EXAMPLES[:5])
TEXT = Task("x", "text", (Example("", "abc"), Example("", "de")), (Example("", "fgh"),))


class Kept:
    """A `Keep` that remembers what it was asked for."""

    def __init__(self) -> None:
        self.keys: list[str | None] = []

    def __call__(self, key: str | None, encode: Callable[[], Iterator[Encoded]]) -> Table:
        self.keys.append(key)
        return pack(encode())


def make(tokenizer: Any = None, objective: Any = "causal_lm", labels: tuple[str, ...] = (), **settings: Any) -> Encoder:
    tokenizer = tokenizer or characters()
    return Encoder(tokenizer, objective, TrainConfig(**{"max_length": 12, "max_target_length": 4, **settings}), labels)


def keys(encoder: Encoder, task: Task) -> list[str | None]:
    """The keys of the three splits."""
    kept = Kept()
    data = TokenisedData(encoder, kept)
    for get in (data.train, data.prompts, data.chunks):
        get(task)
    return kept.keys


def test_it_is_what_the_encoder_makes() -> None:
    encoder = make()
    data = TokenisedData(encoder)
    assert data.train(TASK) == list(encoder.train(TASK))
    assert [each.input_ids for each in data.prompts(TASK)] == [encoder.prompt_ids(e.prompt) for e in TASK.evaluation]
    assert data.chunks(TEXT) == list(encoder.text_chunks(TEXT.evaluation))


def test_everything_is_tokenised_once_and_only_when_it_is_needed() -> None:
    kept = Kept()
    data = TokenisedData(make(), kept)
    tasks = [replace(TASK, name=str(number)) for number in range(5)]
    stream = data.stream(tasks)
    assert len(past_samples(stream[:3], 0.0, seed=1)) == 0
    assert kept.keys == []
    for _ in range(2):
        assert stream[3] == stream[2:][1]
        assert len(data.prompts(tasks[0])) == 5
    assert len(kept.keys) == 2
    assert [len(samples) for samples in stream] == [20] * 5
    assert len(kept.keys) == 6


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    documents = [Example("", "abcdefg"[: 1 + number % 6]) for number in range(9)]
    tasks, settings = (TASK, replace(TEXT, train=documents)), {"max_length": 5, "max_target_length": 3}
    whole = [list(make(**settings).train(task)) for task in tasks]
    assert len(whole[1]) == 9  # 30 letters and 9 ends, in chunks of 4 and a special token, the last without a target
    for size in (1, 2, 4):
        monkeypatch.setattr(encode, "_AT_ONCE", size)
        assert [list(make(**settings).train(task)) for task in tasks] == whole


CHANGES: dict[str, Callable[[], tuple[Encoder, Task]]] = {
    "a prompt": lambda: (make(), replace(TASK, train=(Example("r", "a"), *EXAMPLES[1:]), evaluation=EXAMPLES[1:6])),
    "an answer": lambda: (make(), replace(TASK, train=(Example("q", "x"), *EXAMPLES[1:]))),
    "one sample fewer": lambda: (make(), replace(TASK, train=EXAMPLES[1:], evaluation=EXAMPLES[:4])),
    "where a prompt ends": lambda: (make(), replace(TASK, train=(Example("qa", ""), *EXAMPLES[1:]))),
    "length": lambda: (make(max_length=11), TASK),
    "length of answers": lambda: (make(max_target_length=3), TASK),
    "truncation": lambda: (make(truncate="left"), TASK),
    "long answers": lambda: (make(long_answers="cut"), TASK),
    "objective": lambda: (make(objective="seq2seq_lm"), TASK),
    "special tokens": lambda: (make(characters("<s> $A </s>")), TASK),
    "vocabulary": lambda: (make(_renumbered()), TASK),
    "labels, which reserve room": lambda: (make(labels=("a", "b")), TASK),
    "kind": lambda: (make(), replace(TASK, kind="text")),
}


def _renumbered() -> Any:
    tokenizer = characters()
    tokenizer.add_tokens(["qq"])
    return tokenizer


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_decides_the_ids_changes_the_key(change: str) -> None:
    before, now = keys(make(), TASK), keys(*CHANGES[change]())
    assert before[0] != now[0]
    assert len({*before, *now}) >= 4


def test_template_and_date_change_the_key() -> None:
    tokenizer = characters()
    found = set()
    for template, date in (
        ("{{ strftime_now('%d') }}", "2025-01-01"),
        ("{{ strftime_now('%d') }}", "2025-01-02"),
        ("", ""),
    ):
        body = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
        tokenizer.chat_template = template + body
        encoder = make(tokenizer, template="chat", max_length=60, **({"date": date} if date else {}))
        found.add(keys(encoder, TASK)[0])
    found.add(keys(make(tokenizer, max_length=60), TASK)[0])
    assert len(found) == 4


def test_the_release_of_the_encoding_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(make(), TASK)
    monkeypatch.setattr(encode, "ENCODING", encode.ENCODING + 1)
    assert not {*before} & {*keys(make(), TASK)}


def test_what_does_not_matter_leaves_the_key() -> None:
    moved = characters()
    moved.init_kwargs["name_or_path"] = "/elsewhere"
    other = replace(TASK, name="other", origins=("a", "b"))
    assert keys(make(moved, learning_rate=0.5), other) == keys(make(), TASK)
    # A decoder's ids do not depend on which labels there are, as long as the longest one is as long.
    assert keys(make(labels=("ab", "b")), TASK) == keys(make(labels=("ba",)), TASK)
    labelled = replace(TASK, kind="classification")
    encoders = [make(objective="classification", labels=names) for names in (("a", "b"), ("b", "a"))]
    kept = Kept()
    first, second = (TokenisedData(encoder, kept).train(labelled) for encoder in encoders)
    assert first != second
    assert kept.keys[0] != kept.keys[1]


def test_a_tokenizer_with_code_of_its_own_has_no_key() -> None:
    tokenizer = characters()
    kind: Any = type(tokenizer)
    tokenizer.__class__ = type("Mine", (kind,), {"__module__": "mine"})
    assert keys(make(tokenizer), TASK) == [None, None, None]


def test_checks_find_what_training_would_refuse() -> None:
    for task, problem in (
        (replace(TASK, train=(*EXAMPLES, Example("q", "abcdef"))), "training sample 20: the answer takes"),
        (replace(TEXT, train=(Example("", ""),)), "the training text is too short"),
    ):
        with pytest.raises(BadInput, match=problem):
            make(characters("$A")).check(task)
    make().check(TASK)
    make().check(TEXT)


def test_other_ids_need_another_version_of_the_encoding() -> None:
    """If this fails, ids have changed: raise `ENCODING`, or caches of earlier releases are stale; then adapt it."""
    tokenizer, found = characters("<s> $A </s>"), []
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    labelled = replace(TASK, kind="classification")
    for objective, task, settings in (
        ("causal_lm", TASK, {}),
        ("causal_lm", TEXT, {"max_length": 4, "max_target_length": 2}),
        ("causal_lm", TASK, {"truncate": "left", "max_length": 9, "long_answers": "cut"}),
        ("causal_lm", TASK, {"template": "chat", "max_length": 60, "max_target_length": 20}),
        ("seq2seq_lm", TASK, {"max_length": 6}),
        ("classification", labelled, {"labels": ("a", "b")}),
        ("masked_lm", TEXT, {"max_length": 5}),
    ):
        encoder = make(tokenizer, objective, **settings)
        prompts = list(encoder.each_prompt(task)) if task.kind != "text" else []
        found += [[sample.input_ids, sample.labels] for sample in (*encoder.train(task), *prompts)]
    assert (encode.ENCODING, len(found), text_digest(found)[:16]) == (1, 130, "d54a6a1aef72415f")
