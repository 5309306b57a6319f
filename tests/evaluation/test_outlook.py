"""Remarks about scores before training: indistinguishable labels, references that cannot be generated."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from cl_dist.config.objectives import ObjectiveName
from cl_dist.config.schema import EvalConfig, TrainConfig
from cl_dist.errors import BadInput
from cl_dist.evaluation.outlook import Notice, outlook
from cl_dist.models.builtin import byte_tokenizer
from cl_dist.tasks.encode import Encoder, label_names
from cl_dist.tasks.types import Example, Task

WORDS = ("<unk>", "<pad>", "</s>", "good", "bad", "very", ":")


def words(lower: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer with a few words; all others are the same unknown token."""
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer, tokenizer.decoder = Whitespace(), decoders.WordPiece()
    if lower:
        tokenizer.normalizer = normalizers.BertNormalizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def labelled(*labels: str, **rest: Any) -> Task:
    """A classification task."""
    train, samples = ([Example(prompt, label) for label in labels] for prompt in ("question", "another question"))
    return Task("t", "classification", train, [*samples, *samples], labels, **rest)


def free(*answers: str, **rest: Any) -> Task:
    """A task with free answers."""
    samples = [Example("question", answer) for answer in answers]
    return Task("free", "generation", [], samples, **rest)


def look(
    *tasks: Task, tokenizer: Any = None, objective: ObjectiveName = "causal_lm", template: Any = "none", **config: Any
) -> tuple[Notice, ...]:
    """The notices about tasks."""
    train = TrainConfig(template=template)
    encoder = Encoder(tokenizer or byte_tokenizer("decoder"), objective, train, label_names(tasks))
    return outlook(tasks, encoder, objective, EvalConfig(**config))


def about(notices: tuple[Notice, ...]) -> list[str]:
    return [notice.about for notice in notices]


@pytest.mark.parametrize("objective", ["causal_lm", "seq2seq_lm"])
def test_labels_of_the_same_tokens(objective: ObjectiveName) -> None:
    task = labelled("good", "\u6b63", "\u8ca0")
    with pytest.raises(BadInput, match="labels '\u6b63' and '\u8ca0' are the same tokens to this model's tokenizer"):
        look(task, tokenizer=words(), objective=objective)
    assert look(task, objective=objective) == ()  # a byte tokenizer knows every character
    assert look(labelled("good", "\u6b63"), tokenizer=words(), objective=objective) == ()  # only one unknown label


def test_labels_that_a_tokenizer_makes_alike_by_case() -> None:
    with pytest.raises(BadInput, match="labels 'good' and 'Good' are the same tokens"):
        look(labelled("good", "Good"), tokenizer=words(lower=True))


def test_the_start_of_another_label_and_labels_of_other_tasks_are_no_trouble() -> None:
    assert look(labelled("very", "very good"), tokenizer=words()) == ()
    tasks = [labelled("good", "\u6b63"), labelled("bad", "\u8ca0")]
    assert look(*tasks, tokenizer=words()) == ()


def test_a_classifiers_labels_are_not_tokenised() -> None:
    tokenizer = byte_tokenizer("encoder")
    assert look(labelled("\u6b63", "\u8ca0"), tokenizer=tokenizer, objective="classification") == ()


def test_a_label_that_cannot_be_generated() -> None:
    with pytest.raises(
        BadInput, match="label '\u6b63' cannot be generated: the tokenizer or the chat template turns it into ''"
    ):
        look(labelled("good", "\u6b63"), tokenizer=words(), mode="generate")
    assert look(labelled("good", "very bad"), tokenizer=words(), mode="generate") == ()
    assert look(labelled("GOOD", "very bad"), tokenizer=words(lower=True), mode="generate") == ()


def test_labels_that_a_template_edits() -> None:
    tokenizer = byte_tokenizer("decoder")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content if m.role == 'user' else m.content.split(':')[-1] }}{% endfor %}"
    )
    with pytest.raises(BadInput, match="labels 'a:x' and 'b:x' are the same tokens"):
        look(labelled("a:x", "b:x"), tokenizer=tokenizer, template="chat")
    (notice,) = look(free("so: yes", "no"), tokenizer=tokenizer, template="chat", metric="exact_match")
    assert "1 of 2 reference answers cannot be generated" in notice.text
    assert "turns 'so: yes' into 'yes'" in notice.text


def test_labels_that_are_one_without_punctuation() -> None:
    task = labelled("C", "C++", "other")
    assert look(task) == ()
    with pytest.raises(BadInput, match=r"labels 'C' and 'C\+\+' are the same without punctuation"):
        look(task, normalise="punctuation")
    with pytest.raises(BadInput, match=r"nothing is left of the label '\+' without punctuation"):
        look(labelled("+", "other"), normalise="punctuation")


def test_labels_that_differ_in_case_alone() -> None:
    for normalise in ("none", "punctuation"):
        (notice,) = look(labelled("yes", "Yes", "no"), normalise=normalise)
        assert notice.text == (
            "task 't': the labels 'yes' and 'Yes' differ only in case, so the scorer does not tell them apart"
        )


def test_references_that_are_longer_than_what_is_generated() -> None:
    task = free("four", "eleven long", "twelve longs", "twelve longs")
    (notice,) = look(task, max_new_tokens=12)  # one token per byte, the leading space and the end
    assert notice.text == (
        "task 'free': 2 of 3 reference answers take more than 12 tokens (the longest 14), and generation is cut there "
        "(eval.max_new_tokens)"
    )
    assert look(task, max_new_tokens=14) == ()
    assert look(labelled("four", "eleven long"), max_new_tokens=3) == ()  # likelihood generates nothing
    assert about(look(labelled("four", "eleven long"), mode="generate", max_new_tokens=3)) == ["long_references"]


def test_every_reference_counts() -> None:
    task = Task("several", "generation", [], [Example("q", "a", ("a", "a long one"))])
    assert about(look(task, max_new_tokens=5)) == ["long_references"]


def test_references_that_the_tokenizer_loses() -> None:
    assert about(look(free("good", "\u6b63"), tokenizer=words(), metric="exact_match")) == ["lost_text"]
    assert look(free("good", "very bad"), tokenizer=words()) == ()


@pytest.mark.parametrize("text", ["\u041f\u0440\u0438\u0432\u0435\u0442", "\u79c1\u306f 2", "?!"])
def test_references_that_rouge_drops(text: str) -> None:
    (notice,) = look(free("plain", text))
    assert "1 of 2 reference answers are written in characters that ROUGE-L's default tokenizer drops" in notice.text
    assert look(free("plain", text), rouge_tokenizer="unicode") == ()
    assert look(free("plain", text), metric="exact_match") == ()
    assert look(free("caf\u00e9 au lait", "na\u00efve")) == ()


def test_where_labels_and_scores_come_from() -> None:
    inferred = labelled("yes", "no", labels_from="training answers")
    notice, summary = look(inferred)
    assert (notice.text, notice.on_screen) == ("task 't': 2 labels found in the training answers: yes, no", False)
    assert (summary.task, summary.on_screen) == (None, True)
    assert summary.text == "labels found in the training answers: t 2; to state them, set `labels`"
    outside = labelled("yes", "no", labels_from="training answers", unlisted=3)
    assert "the answers of 3 of 4 evaluation samples match none of the 2 labels" in look(outside)[1].text
    (notice,) = look(labelled("yes", "no", scored_on="train"))
    assert notice.text.startswith("task 't' has no evaluation file, so it is scored on its training data")
    assert notice.on_screen
    same = [Example("question", "x")]
    (notice,) = look(Task("t", "generation", same, list(same), scored_on="dev"))
    assert notice.text == "task 't': the samples of its dev split are those that it is trained on"


@pytest.mark.parametrize(
    ("known", "words", "on_screen"), [(4, "the samples of", True), (2, "2 of 4 samples", True), (1, "1 of 4", False)]
)
def test_samples_that_are_trained_on_are_found_in_any_order(known: int, words: str, on_screen: bool) -> None:
    train = [Example(f"question {number}", "x") for number in range(9)]
    samples = [*train[:known][::-1], *(Example(f"new {number}", "x") for number in range(4 - known))]
    (notice,) = look(Task("t", "generation", train, samples))
    assert notice.text.startswith(f"task 't': {words}")
    assert notice.text.endswith("that it is trained on")
    assert notice.on_screen == on_screen


def test_an_answer_of_the_same_prompt_is_another_sample() -> None:
    assert look(Task("t", "generation", [Example("q", "x")], [Example("q", "y")])) == ()


@pytest.mark.parametrize("hidden", ["\u200b", "\ufeff", "\u00ad", "\u200e"])
def test_labels_that_differ_in_what_cannot_be_seen(hidden: str) -> None:
    (notice,) = look(labelled("yes", f"y{hidden}es", "no"))
    assert notice.text == (
        f"task 't': the labels 'yes' and {f'y{hidden}es'!r} differ only in invisible characters, and count as two"
    )
    assert hidden not in notice.text


def test_labels_that_differ_in_a_blank() -> None:
    (notice,) = look(labelled("very good", "very\u00a0good", "no"))
    assert "differ only in case or white space" in notice.text


OVER = "{% for m in messages %}{{ m.content }}{{ '|' if m.role == 'user' else '[over]' }}{% endfor %}"


def test_words_behind_an_answer_are_no_part_of_it() -> None:
    """They are generated, so they count towards `eval.max_new_tokens`, and are removed afterwards."""
    tokenizer = byte_tokenizer("decoder")
    tokenizer.chat_template = OVER
    assert look(labelled("good", "bad"), tokenizer=tokenizer, template="chat", mode="generate") == ()
    assert look(free("some text"), tokenizer=tokenizer, template="chat", metric="exact_match", max_new_tokens=16) == ()
    (notice,) = look(free("some text"), tokenizer=tokenizer, template="chat", max_new_tokens=15)
    assert "take more than 15 tokens (the longest 16)" in notice.text  # [over] and the end


def test_tasks_of_different_scores() -> None:
    tasks = [labelled("yes", "no"), free("some text")]
    (notice,) = look(*tasks)
    assert notice.task is None
    assert "means of different scores: exact_match (t); rouge_l (free)" in notice.text
    assert look(*tasks, mode="generate", metric="exact_match") == ()
    (notice,) = look(*tasks, metric="exact_match")
    assert "exact_match by likelihood (t); exact_match by generate (free)" in notice.text


def test_the_first_task_that_the_model_cannot_score_is_named() -> None:
    with pytest.raises(BadInput, match="'free'"):
        look(labelled("good", "bad"), free("very good"), tokenizer=words(), objective="classification")
