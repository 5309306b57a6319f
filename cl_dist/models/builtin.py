"""Tiny models of the three families and a byte-level tokenizer, built without a network.

The quickstart and the tests use them, and they serve to try a recipe out. Their widths are chosen so that ZeRO's shards
end inside rows.
"""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedTokenizerFast, RobertaConfig, T5Config

from cl_dist.config.objectives import Family

SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<mask>", "<unk>")
PAD_ID, BOS_ID, EOS_ID, MASK_ID, UNK_ID = range(len(SPECIAL_TOKENS))
VOCABULARY_SIZE = len(SPECIAL_TOKENS) + 256
POSITIONS = 1024
ROBERTA_POSITIONS = 512


def builtin_config(name: str) -> PreTrainedConfig:
    """Return the configuration of the built-in model `name` (one of `config.schema.BUILTIN_MODELS`)."""
    return _CONFIGURATIONS[name]()


def _llama_tiny() -> PreTrainedConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=False,
        initializer_range=0.1,  # about 1 / sqrt(hidden_size); 0.02 suits widths in the thousands
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


def _t5_tiny() -> PreTrainedConfig:
    return T5Config(
        vocab_size=VOCABULARY_SIZE,
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="relu",
        pad_token_id=PAD_ID,
        eos_token_id=EOS_ID,
        decoder_start_token_id=PAD_ID,  # type: ignore[call-arg]  # taken by **kwargs, as the published configurations do
    )


def _roberta_tiny() -> PreTrainedConfig:
    return RobertaConfig(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=64,
        intermediate_size=172,
        num_hidden_layers=2,
        num_attention_heads=4,
        # RoBERTa numbers positions from pad_token_id + 1, so its table has two more rows than the longest input has
        # tokens (514 in the published models).
        max_position_embeddings=ROBERTA_POSITIONS + 2,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.1,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )


_CONFIGURATIONS: dict[str, Callable[[], PreTrainedConfig]] = {
    "builtin:llama-tiny": _llama_tiny,
    "builtin:t5-tiny": _t5_tiny,
    "builtin:roberta-tiny": _roberta_tiny,
}


_TEMPLATES: dict[Family, str] = {"decoder": "<s> $A", "encoder": "<s> $A </s>", "encoder-decoder": "$A </s>"}
"""Special tokens that encoding adds, as in the published tokenizers of Llama, RoBERTa and T5."""

_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{{ eos_token if message['role'] == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
"""How the decoder's tokenizer renders a conversation, so that recipes for chat models run on it too."""


def byte_tokenizer(family: Family) -> PreTrainedTokenizerFast:
    """Build a tokenizer with one entry per byte and five special tokens; every text survives a round trip."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate((*SPECIAL_TOKENS, *symbols))}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=_TEMPLATES[family], special_tokens=[("<s>", BOS_ID), ("</s>", EOS_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        mask_token="<mask>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=_CHAT_TEMPLATE if family == "decoder" else None,
    )
