"""Small tokenizers of the kinds that matter: where special tokens stand, and how a space before a word is kept."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, normalizers
from tokenizers.models import WordLevel
from tokenizers.normalizers import Normalizer
from tokenizers.pre_tokenizers import PreTokenizer, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
"""Special tokens; their ids are 0 to 3."""

PAD, BOS, EOS, MASK = range(4)


def build(
    splitter: PreTokenizer, words: list[str], template: str, special: dict[str, str], space: Normalizer | None = None
) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `template` places the special tokens around the text `$A`."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = splitter
    if space is not None:
        tokenizer.normalizer = space
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(token, number) for token, number in vocabulary.items() if token in SPECIAL]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def characters(template: str = "<s> $A", **special: str) -> PreTrainedTokenizerFast:
    """One token a printable ASCII character, spaces included; character c has the id `ord(c) - 28`.

    Without `special` it has pad, BOS, EOS and mask tokens.
    """
    every = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    return build(Split(Regex("."), "isolated"), [chr(c) for c in range(32, 127)], template, special or every)


def ids(text: str) -> list[int]:
    """What `characters` makes of a text."""
    return [ord(character) - 28 for character in text]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with "▁" for the space before them, one more put before every text, as Llama 2 does.

    So " yes" alone is "▁" and "▁yes", while behind a prompt it is "▁yes" only.
    """
    words = ["<unk>", "▁:", "▁yes", "▁question", "▁"]
    space = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = {"eos_token": "</s>", "bos_token": "<s>"}
    return build(Split(Regex("▁[^▁]*"), "isolated"), words, "<s> $A", special, space)
