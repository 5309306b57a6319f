"""The tokenizers of ROUGE-L."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.tokenizers import DefaultTokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from cl_dist.config.schema import EvalConfig
from cl_dist.errors import BadInput
from cl_dist.evaluation.rouge_tokens import UnicodeTokenizer, rouge_tokenizer
from cl_dist.evaluation.scores import comparison

TEXTS = [
    "\u79c1\u306f\u732b\u304c\u597d\u304d",  # Japanese
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440",  # Russian
    "\u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902",  # Hindi
    "\u0e20\u0e32\u0e29\u0e32",  # Thai
    "?!",
]


@pytest.fixture(scope="module")
def byte_pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE tokenizer like GPT-2's, with a few words."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the cat the cat sat sat"] * 9, trainer)
    folder = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


def test_tokens_of_gpt2_without_the_blank_before_them(byte_pairs: Path) -> None:
    assert rouge_tokenizer("xlingual", str(byte_pairs)).tokenize("the cat sat cat") == ["the", "cat", "sat", "cat"]


@pytest.mark.parametrize("text", TEXTS)
def test_the_same_text_in_any_script_scores_one(text: str, byte_pairs: Path) -> None:
    assert comparison("rouge_l", EvalConfig()).score(text, text) == 0.0
    settings = [
        EvalConfig(rouge_tokenizer="unicode"),
        EvalConfig(rouge_tokenizer="xlingual", rouge_tokenizer_path=str(byte_pairs)),
    ]
    for config in settings:
        score = comparison("rouge_l", config).score
        assert score(text, text) == 1.0
        assert score(text, "x") == score("", text) == 0.0
        assert 0 < score(text[:-1], text) < 1


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("\u79c1\u306f\u732b2\u5339", ["\u79c1", "\u306f", "\u732b", "2", "\u5339"]),
        ("\u041a\u043e\u0442 \u0438 Cats", ["\u043a\u043e\u0442", "\u0438", "cat"]),
        (
            "\u0939\u093f\u0928\u094d\u0926\u0940, \u092e\u0947\u0902",
            ["\u0939\u093f\u0928\u094d\u0926\u0940", "\u092e\u0947\u0902"],
        ),
        ("caf\u00e9s", ["caf\u00e9s"]),
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5", ["\ud55c\uad6d\uc5b4", "\ubb38\uc7a5"]),
        ("a_b don't", ["a", "b", "don", "t"]),
        ("?! ", ["?", "!"]),
        ("", []),
    ],
)
def test_words_of_any_script(text: str, tokens: list[str]) -> None:
    assert UnicodeTokenizer().tokenize(text) == tokens


@given(st.text(st.characters(codec="ascii")))
def test_ascii_has_the_tokens_of_the_default(text: str) -> None:
    default = DefaultTokenizer(use_stemmer=True).tokenize(text)
    assert UnicodeTokenizer().tokenize(text) == (default or (text.split() and [c for c in text if not c.isspace()]))


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"xlingual needs GPT-2's tokenizer, and .* cannot be loaded; .* or use unicode"):
        rouge_tokenizer("xlingual", str(tmp_path / "nothing"))
