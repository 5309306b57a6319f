"""Tiny models of the three families with random weights, large enough in scale for scores to differ clearly."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

VOCABULARY = 61
PAD, EOS = 0, 1
TOKENS: dict[str, Any] = {"pad_token_id": PAD, "eos_token_id": EOS, "bos_token_id": 2}
WIDTHS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER: dict[str, Any] = {**WIDTHS, **TOKENS, "num_key_value_heads": 2}


def scaled(model: Any) -> Any:
    """The model in evaluation mode, with larger weights than transformers draws: small weights hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3, generator=generator)
    model.tie_weights()
    return model.eval()


def llama(attention: str = "sdpa") -> Any:
    """A two-layer Llama with grouped heads."""
    model = LlamaForCausalLM(LlamaConfig(**DECODER))
    model.set_attn_implementation(attention)
    return scaled(model)


class FullLogitsLlama(LlamaForCausalLM):
    """A Llama that, like some models with custom code, cannot compute only some of the logits."""

    def forward(self, input_ids: Any, attention_mask: Any = None, position_ids: Any = None) -> Any:
        """Logits of all positions."""
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)


def full_logits_llama() -> Any:
    """A model whose `forward` has neither `logits_to_keep` nor `use_cache`."""
    return scaled(FullLogitsLlama(LlamaConfig(**DECODER)))


def mistral(window: int) -> Any:
    """A decoder with a sliding window."""
    return scaled(MistralForCausalLM(MistralConfig(**DECODER, sliding_window=window)))


def gpt2() -> Any:
    """A decoder with learnt absolute positions."""
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, **TOKENS)
    return scaled(GPT2LMHeadModel(config))


def bloom() -> Any:
    """A decoder whose `forward` takes no positions."""
    return scaled(BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **TOKENS)))


def t5() -> Any:
    """A two-layer encoder-decoder."""
    widths: dict[str, Any] = {
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "decoder_start_token_id": PAD,
    }
    return scaled(T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **widths, **TOKENS)))


def bart() -> Any:
    """A two-layer encoder-decoder with learnt absolute positions."""
    widths: dict[str, Any] = {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
    }
    config = BartConfig(vocab_size=VOCABULARY, d_model=32, max_position_embeddings=64, **widths, **TOKENS)
    return scaled(BartForConditionalGeneration(config))


def roberta(labels: int) -> Any:
    """A two-layer encoder with a classification head."""
    config = RobertaConfig(**WIDTHS, **TOKENS, max_position_embeddings=66, type_vocab_size=1)
    config.num_labels = labels
    return scaled(RobertaForSequenceClassification(config))


def word_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with words `w2`, `w3`, ..., one for each id in the tiny models' vocabulary."""
    words = {"<pad>": PAD, "</s>": EOS} | {f"w{number}": number for number in range(2, VOCABULARY)}
    inner = Tokenizer(WordLevel(words))
    inner.pre_tokenizer = WhitespaceSplit()
    build: Any = PreTrainedTokenizerFast
    tokenizer: PreTrainedTokenizerFast = build(tokenizer_object=inner, pad_token="<pad>", eos_token="</s>")
    return tokenizer
