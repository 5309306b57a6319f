"""Writes the built-in Llama as a GGUF file, with llama.cpp's names and its order of the rotary dimensions."""

from __future__ import annotations

from pathlib import Path

from gguf import GGUFWriter, TokenType
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.layers": "blk",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
SPECIAL = 5
UNKNOWN = 4


def write_gguf(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, file: Path) -> None:
    """Write `model` in float32 and the byte tokenizer into `file`."""
    writer = GGUFWriter(str(file), "llama")
    config = model.config
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        renamed = _renamed(name)
        writer.add_tensor(renamed, _interleaved(parameter.detach(), heads.get(renamed.split(".")[-2], 0)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens[UNKNOWN] = "<|endoftext|>"  # transformers' unknown token, which it adds if missing
    tokens[-1] = tokens[SPECIAL] + tokens[SPECIAL + 1]  # readers expect one merge or more; this replaces a rare byte
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL if i < SPECIAL else TokenType.NORMAL for i in range(len(tokens))])
    writer.add_token_merges([f"{tokens[SPECIAL]} {tokens[SPECIAL + 1]}"])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_unk_token_id(tokenizer.unk_token_id)


def _renamed(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """llama.cpp stores the two halves of a rotary pair side by side; transformers stores them half a head apart."""
    if not heads:
        return weight
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns).contiguous()
