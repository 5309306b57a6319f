"""Token ids of prompts and answers under every objective."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from cl_dist.config.objectives import ObjectiveName
from cl_dist.config.schema import TrainConfig
from cl_dist.errors import BadInput
from cl_dist.tasks.encode import Encoder, find_special_tokens, label_names
from cl_dist.tasks.template import cut
from cl_dist.tasks.types import IGNORE, Example, Kind, Task
from tests.tasks.tiny_tokenizers import BOS, EOS, PAD, SPECIAL, characters, ids, sentencepiece_like

FRAME = "<s> $A </s>"


def make_task(*examples: tuple[str, str], kind: Kind = "generation", labels: tuple[str, ...] = ()) -> Task:
    """A task of these training samples."""
    samples = [Example(*example) for example in examples]
    return Task("t", kind, samples, samples, labels)


def make_encoder(
    objective: ObjectiveName, tokenizer: Any = None, labels: tuple[str, ...] = (), **train: Any
) -> Encoder:
    """An encoder with a character tokenizer unless another is given."""
    return Encoder(tokenizer or characters(), objective, TrainConfig(**train), labels)


def test_causal_sample_has_loss_on_the_answer_alone() -> None:
    (sample,) = make_encoder("causal_lm").train(make_task(("Q:", "ab")))
    assert sample.input_ids == [BOS, *ids("Q: ab"), EOS]
    assert sample.labels == [IGNORE] * 3 + [*ids(" ab"), EOS]
    assert (sample.index, sample.targets) == (0, 4)


def test_causal_sample_drops_what_the_tokenizer_adds_after_a_text() -> None:
    (sample,) = make_encoder("causal_lm", characters(FRAME)).train(make_task(("Q:", "a")))
    assert sample.input_ids == [BOS, *ids("Q: a"), EOS]


def test_seq2seq_sample_has_source_and_target() -> None:
    (sample,) = make_encoder("seq2seq_lm", characters("$A </s>")).train(make_task(("Q:", "ab")))
    assert sample.input_ids == [*ids("Q:"), EOS]
    assert sample.labels == [*ids("ab"), EOS]


def test_seq2seq_with_a_byte_tokenizer_of_transformers() -> None:
    tokenizer = ByT5Tokenizer()
    (sample,) = make_encoder("seq2seq_lm", tokenizer).train(make_task(("Q:", "ab")))
    assert sample.input_ids == tokenizer("Q:")["input_ids"]
    assert sample.labels == tokenizer("ab")["input_ids"]


def test_classification_sample_has_the_number_of_its_label_in_the_stream() -> None:
    task = make_task(("Q", "b"), ("R", "a"), kind="classification", labels=("a", "b"))
    samples = make_encoder("classification", characters(FRAME), ("x", "a", "b")).train(task)
    assert [sample.labels for sample in samples] == [[2], [1]]
    assert samples[0].input_ids == [BOS, *ids("Q"), EOS]


def test_label_names_keep_first_appearance() -> None:
    tasks = [make_task(labels=("c", "a")), make_task(), make_task(labels=("a", "b"))]
    assert label_names(tasks) == ("c", "a", "b")


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [(characters(), [*ids(" yes"), EOS]), (sentencepiece_like(), [len(SPECIAL) + 2, EOS])],
)
def test_answer_ids_are_those_after_a_prompt(tokenizer: Any, expected: list[int]) -> None:
    encoder = make_encoder("causal_lm", tokenizer)
    assert encoder.answer_ids("yes") == expected
    together = tokenizer("question: yes" if tokenizer.vocab_size > 20 else "question yes")["input_ids"]
    assert together[-len(expected) + 1 :] == expected[:-1]


def test_answer_ids_may_be_changed_by_the_caller() -> None:
    encoder = make_encoder("causal_lm")
    encoder.answer_ids("a").clear()
    assert encoder.answer_ids("a") == [*ids(" a"), EOS]


@pytest.mark.parametrize(("template", "expected"), [("$A", ([], [])), ("<s> $A", ([BOS], [])), (FRAME, ([BOS], [EOS]))])
def test_special_tokens(template: str, expected: tuple[list[int], list[int]]) -> None:
    assert find_special_tokens(characters(template)) == expected


@pytest.mark.parametrize(("side", "kept"), [("middle", "abcij"), ("left", "fghij"), ("right", "abcde")])
def test_truncation_cuts_the_prompt(side: Any, kept: str) -> None:
    encoder = make_encoder("causal_lm", max_length=9, truncate=side)
    (sample,) = encoder.train(make_task(("abcdefghij", "z")))
    assert sample.input_ids == [BOS, *ids(kept), *ids(" z"), EOS]


@given(st.lists(st.integers(), max_size=30), st.integers(0, 30), st.sampled_from(["middle", "left", "right"]))
def test_cut_keeps_order_and_as_much_as_fits(numbers: list[int], room: int, side: Any) -> None:
    kept = cut(numbers, room, side)
    assert len(kept) == min(len(numbers), room)
    end = {"middle": len(kept) // 2, "left": len(kept), "right": 0}[side]
    assert kept == numbers[: len(kept) - end] + numbers[len(numbers) - end :]


@given(
    prompt=st.text("abc ", min_size=1, max_size=40),
    answer=st.text("xyz", min_size=1, max_size=6),
    max_length=st.integers(10, 40),
    objective=st.sampled_from(["causal_lm", "seq2seq_lm"]),
)
def test_no_sample_is_too_long_and_every_answer_is_whole(
    prompt: str, answer: str, max_length: int, objective: ObjectiveName
) -> None:
    encoder = make_encoder(objective, CHARACTERS, max_length=max_length)
    (sample,) = encoder.train(make_task((prompt, answer)))
    assert len(sample.input_ids) <= max_length
    assert [label for label in sample.labels if label != IGNORE] == encoder.answer_ids(answer)


CHARACTERS = characters()


def test_prompt_leaves_room_for_the_longest_label() -> None:
    encoder = make_encoder("causal_lm", labels=("a", "long"), max_length=12)
    assert len(encoder.prompt_ids("p" * 50)) == 12 - len(encoder.answer_ids("long"))
    assert len(encoder.prompt_ids("p" * 50, answer_length=3)) == 9


def test_prompt_leaves_room_for_generated_text() -> None:
    assert len(make_encoder("causal_lm", max_length=40, max_target_length=8).prompt_ids("p" * 50)) == 32
    assert len(make_encoder("causal_lm", max_length=40).prompt_ids("p" * 50)) == 20


def test_seq2seq_source_needs_no_room_for_the_answer() -> None:
    assert len(make_encoder("seq2seq_lm", characters("$A </s>"), max_length=12).prompt_ids("p" * 50)) == 12


def test_causal_text_is_joined_and_cut_into_chunks() -> None:
    task = make_task(("", "abc"), ("", "de"), kind="text")
    chunks = make_encoder("causal_lm", max_length=5).train(task)
    assert [chunk.input_ids for chunk in chunks] == [[BOS, *ids("abc"), EOS], [BOS, *ids("de"), EOS]]
    assert chunks[0].labels == [IGNORE, *ids("abc"), EOS]


def test_causal_text_without_bos_drops_a_chunk_that_predicts_nothing() -> None:
    chunks = make_encoder("causal_lm", characters("$A"), max_length=3).train(make_task(("", "abc"), kind="text"))
    assert [chunk.input_ids for chunk in chunks] == [ids("abc")]
    assert chunks[0].labels == [IGNORE, *ids("bc")]


def test_masked_text_is_between_special_tokens() -> None:
    chunks = make_encoder("masked_lm", characters(FRAME), max_length=5).train(make_task(("", "abcde"), kind="text"))
    assert [chunk.input_ids for chunk in chunks] == [[BOS, *ids("abc"), EOS], [BOS, *ids("de"), EOS]]
    assert chunks[1].labels == [IGNORE, *ids("de"), IGNORE]


def test_pad_id_is_that_of_padding_or_else_end_of_sequence() -> None:
    assert make_encoder("causal_lm").pad_id == PAD
    assert make_encoder("causal_lm", characters(eos_token="</s>")).pad_id == EOS


@pytest.mark.parametrize(
    ("objective", "kind"),
    [
        ("seq2seq_lm", "text"),
        ("classification", "text"),
        ("classification", "generation"),
        ("masked_lm", "classification"),
        ("masked_lm", "generation"),
    ],
)
def test_objective_that_does_not_fit_the_task(objective: ObjectiveName, kind: Kind) -> None:
    with pytest.raises(BadInput, match=f"task 't' is {kind}, but {objective} learns"):
        make_encoder(objective, characters(FRAME)).train(make_task(("q", "a"), kind=kind))


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"max_target_length": 4},
            "training sample 1: the answer takes 5 tokens, but train.max_target_length is 4",
        ),
        ({"max_length": 6}, "sample 1: the answer takes 5 tokens, so train.max_length must be at least 7, not 6"),
    ],
)
def test_answer_that_does_not_fit(settings: dict[str, Any], problem: str) -> None:
    encoder, task = make_encoder("causal_lm", **settings), make_task(("q", "a"), ("q", "abc"))
    for look in (encoder.check, encoder.train):
        with pytest.raises(BadInput, match=problem):
            look(task)


def test_label_that_does_not_fit() -> None:
    with pytest.raises(BadInput, match=r"label 'abc': the answer takes 5 tokens, but train.max_target_length is 4"):
        make_encoder("causal_lm", labels=("abc",), max_target_length=4)


@pytest.mark.parametrize("objective", ["causal_lm", "seq2seq_lm"])
def test_long_answers_are_cut_on_request_and_logged_once_per_task(
    objective: ObjectiveName, caplog: pytest.LogCaptureFixture
) -> None:
    task = make_task(("q", "a"), ("q", "abcdef"), ("q", "ghijkl"))
    with caplog.at_level(logging.WARNING):
        encoder = make_encoder(objective, max_target_length=4, long_answers="cut")
        encoder.check(task)
        whole, one, two = encoder.train(task)
    answers = [[label for label in sample.labels if label != IGNORE] for sample in (whole, one, two)]
    space = " " if objective == "causal_lm" else ""
    expected = ["a", "ab" if space else "abc", "gh" if space else "ghi"]
    assert answers == [[*ids(space + text), EOS] for text in expected]
    assert [record.getMessage() for record in caplog.records] == [
        "task 't': 2 of 3 training answers are cut to 4 tokens (train.long_answers)"
    ]


def test_a_cut_answer_of_a_decoder_leaves_room_for_a_token_of_the_prompt() -> None:
    (sample,) = make_encoder("causal_lm", max_length=8, max_target_length=7, long_answers="cut").train(
        make_task(("qp", "abcdefgh"))
    )
    assert sample.input_ids == [BOS, *ids("q"), *ids(" abcd"), EOS]


def test_nothing_is_logged_if_nothing_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        make_encoder("causal_lm", long_answers="cut").check(make_task(("q", "abc")))
    assert caplog.records == []


def test_a_label_is_never_cut() -> None:
    with pytest.raises(BadInput, match=r"train.max_target_length is 4; a label is never cut: lower stream.max_labels"):
        make_encoder("causal_lm", labels=("abc",), max_target_length=4, long_answers="cut")


@pytest.mark.parametrize(
    ("objective", "special", "problem"),
    [
        ("causal_lm", {"pad_token": "<pad>"}, "no end-of-sequence token, which causal_lm needs"),
        ("seq2seq_lm", {"pad_token": "<pad>"}, "no end-of-sequence token, which seq2seq_lm needs"),
        ("masked_lm", {"pad_token": "<pad>"}, "no mask token, which masked_lm needs"),
        ("classification", {"bos_token": "<s>"}, "neither a padding nor an end-of-sequence token"),
    ],
)
def test_tokenizer_without_a_token(objective: ObjectiveName, special: dict[str, str], problem: str) -> None:
    with pytest.raises(BadInput, match=problem):
        make_encoder(objective, characters(FRAME, **special))


def test_length_without_room_for_a_prompt() -> None:
    with pytest.raises(BadInput, match=r"train\.max_length is 2, but .* it must be at least 3"):
        make_encoder("classification", characters(FRAME), max_length=2)
