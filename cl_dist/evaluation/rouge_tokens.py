"""What ROUGE-L takes for a token, by `eval.rouge_tokenizer`. Imports transformers for GPT-2's tokens only."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

from rouge_score.tokenizers import DefaultTokenizer

from cl_dist.errors import BadInput
from cl_dist.tasks.types import compose

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GPT2 = "gpt2"
"""Where GPT-2's tokenizer is found without `eval.rouge_tokenizer_path`: the name that the benchmark's scorer has."""
_SPACE = "Ġ"
"""What GPT-2's tokens have for the blank before a word."""
_UNSPACED = re.compile(
    # Thai, Lao, Myanmar, Khmer; kana; ideographs, also those beyond the basic plane. Korean is written with blanks.
    "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3041-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff]"
)
"""Letters of scripts that put no blanks between words."""


class RougeTokenizer(Protocol):
    """What rouge_score asks of a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        ...


def rouge_tokenizer(name: str, path: str | None = None) -> RougeTokenizer:
    """The tokenizer that `eval.rouge_tokenizer` and `eval.rouge_tokenizer_path` name.

    Raises BadInput where GPT-2's cannot be loaded.
    """
    if name == "unicode":
        return UnicodeTokenizer()
    return GPT2Tokenizer(load_gpt2(path or GPT2)) if name == "xlingual" else DefaultTokenizer(use_stemmer=True)


class UnicodeTokenizer:
    """Words of any script: runs of letters, digits and their marks, in lower case; each letter of a script without
    blanks is a word, with its marks. Words of ASCII alone are stemmed: an ASCII text has the very tokens that the
    default gives it, and where those are none (`?!`), its characters.
    """

    def __init__(self) -> None:
        self._default = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        lowered = compose(text.lower())
        words = [token for word in _words(lowered) for token in self._stemmed(word)]
        return words or [character for character in lowered if not character.isspace()]

    def _stemmed(self, word: str) -> list[str]:
        return self._default.tokenize(word) if word.isascii() else [word]


def _words(text: str) -> Iterator[str]:
    """Runs of letters, marks and digits; letters of scripts without blanks by themselves, with the marks on them."""
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
    """Tokens of a byte-level BPE tokenizer without the mark of the blank before them, as `GPTTokenizer` of
    Super-NaturalInstructions' eval/automatic/evaluation.py has them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    def tokenize(self, text: str) -> list[str]:
        """The tokens of a text."""
        return [token.lstrip(_SPACE) for token in self._tokenizer.tokenize(text)]


@cache
def load_gpt2(source: str) -> Any:
    """GPT-2's tokenizer out of a folder or from the hub; BadInput where it is not to be had."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # the hub's client and the library raise many unrelated types
        raise BadInput(
            f"eval.rouge_tokenizer: xlingual needs GPT-2's tokenizer, and {source} cannot be loaded; name a folder "
            "that has it in eval.rouge_tokenizer_path, or give unicode, which needs none"
        ) from error
