"""The tokenizers of ROUGE-L (`eval.rouge_tokenizer`).

Each imports its library when it is made: rouge_score brings nltk, scipy and scikit-learn along, GPT-2's needs
transformers.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from cl_dist.errors import BadInput
from cl_dist.tasks.types import compose

if TYPE_CHECKING:
    from rouge_score.tokenizers import DefaultTokenizer
    from transformers import PreTrainedTokenizerBase

GPT2 = "gpt2"
"""GPT-2's tokenizer if `eval.rouge_tokenizer_path` is not set; the benchmark's scorer uses this name."""
_SPACE = "Ġ"
"""GPT-2's character for the space before a word."""
_UNSPACED = re.compile(
    # Thai, Lao, Myanmar, Khmer; kana; ideographs, also beyond the basic plane. Korean has spaces between words.
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Letters of scripts without spaces between words."""


class RougeTokenizer(Protocol):
    """The interface of a tokenizer in rouge_score."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        ...


def rouge_tokenizer(name: str, path: str | None = None) -> RougeTokenizer:
    """The tokenizer for `eval.rouge_tokenizer` and `eval.rouge_tokenizer_path`.

    Raises `BadInput` if GPT-2's tokenizer cannot be loaded.
    """
    if name == "unicode":
        return UnicodeTokenizer()
    return GPT2Tokenizer(load_gpt2(path or GPT2)) if name == "xlingual" else _default_tokenizer()


def _default_tokenizer() -> DefaultTokenizer:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=True)


class UnicodeTokenizer:
    """Lower-case words of any script: runs of letters, digits and combining marks.

    In scripts without spaces, each letter with its marks is a word. ASCII words are stemmed, so an ASCII text has the
    same tokens as with the default tokenizer; if there are none (`?!`), its characters are the tokens.
    """

    def __init__(self) -> None:
        self._default = _default_tokenizer()

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        lowered = compose(text.lower())
        words = [token for word in _words(lowered) for token in self._stemmed(word)]
        return words or [character for character in lowered if not character.isspace()]

    def _stemmed(self, word: str) -> list[str]:
        return self._default.tokenize(word) if word.isascii() else [word]


def _words(text: str) -> Iterator[str]:
    """Runs of letters, marks and digits; in scripts without spaces, single letters with their marks."""
    word, closed = "", False
    for character in text:
        kind = unicodedata.category(character)[0]
        if kind == "M" and word:
            word += character
            continue
        unspaced = _UNSPACED.match(character) is not None
        if word and (closed or unspaced or kind not in "LN"):
            yield word
            word = ""
        if kind in "LN":
            word, closed = word + character, unspaced
    if word:
        yield word


class GPT2Tokenizer:
    """Tokens of a byte-level BPE tokenizer without the character for a leading space.

    Same as `GPTTokenizer` in Super-NaturalInstructions' eval/automatic/evaluation.py.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        return [token.lstrip(_SPACE) for token in self._tokenizer.tokenize(text)]


@cache
def load_gpt2(source: str) -> Any:
    """GPT-2's tokenizer from a folder or the Hub. Raises `BadInput` if it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the Hub's client and the library raise many unrelated types
        raise BadInput(
            f"eval.rouge_tokenizer: xlingual needs GPT-2's tokenizer, and {source} cannot be loaded; set "
            "eval.rouge_tokenizer_path to a folder that has it, or use unicode, which needs none"
        ) from error
