"""Small tokenizers of the kinds that matter: where special tokens stand, and how a space before a word is kept."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import PreTokenizer, Split
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<mask>")
"""Special tokens; their ids are 0 to 3."""

PAD, BOS, EOS, MASK = range(4)


def build(splitter: PreTokenizer, words: list[str], template: str, special: dict[str, str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `template` places the special tokens around the text `$A`."""
    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token=words[0]))
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.Fuse()
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
    """Words with their space before them as "▁", also at the start of a text, as Llama 2 and T5 do."""
    words = ["<unk>", "▁:", "▁yes", "▁no", "▁question", ":"]
    return build(
        pre_tokenizers.Metaspace(prepend_scheme="always"), words, "<s> $A", {"eos_token": "</s>", "bos_token": "<s>"}
    )
