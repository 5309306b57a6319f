"""The model families of the zoo, each as a transformers configuration with two blocks.

The configurations cover the traits of published checkpoints that matter here: tied or untied embeddings, position
tables, grouped heads, experts, sliding windows, recurrent layers, vision towers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import PreTrainedConfig, PreTrainedModel

from cl_dist.config.objectives import Family, ObjectiveName
from cl_dist.models.builtin import BOS_ID, EOS_ID, PAD_ID, VOCABULARY_SIZE, byte_tokenizer
from cl_dist.models.load import AUTO_CLASSES

POSITIONS = 64
"""Longest input of the models with a limit."""

IDS = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
NAMED = {
    "vocab_size": VOCABULARY_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    **IDS,
}
"""Sizes, under the names that most configurations use."""
GROUPED = {**NAMED, "num_key_value_heads": 2}
GPT = {"vocab_size": VOCABULARY_SIZE, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS, **IDS}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
ENCODER = {**NAMED, **NO_DROPOUT}
T5 = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "pad_token_id": PAD_ID,
    "eos_token_id": EOS_ID,
    "decoder_start_token_id": PAD_ID,
}
BART = {
    "vocab_size": VOCABULARY_SIZE,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": POSITIONS,
    "dropout": 0.0,
    "decoder_start_token_id": EOS_ID,
    "forced_eos_token_id": None,
    **IDS,
}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


@dataclass(frozen=True)
class Specimen:
    """One model of the zoo."""

    name: str
    """Its name in docs/models.md."""
    family: Family
    config: Callable[[], PreTrainedConfig]
    objective: ObjectiveName
    """Its training objective."""
    bare: bool = False
    """Whether the checkpoint has no head."""

    @property
    def auto_class(self) -> Any:
        """The class that loads the checkpoint unchanged."""
        if self.bare:
            return hf.AutoModel
        return AUTO_CLASSES["masked_lm" if self.family == "encoder" else _FIRST[self.family]]

    def build(self, folder: Path) -> Path:
        """Write the model, with weights from a fixed seed, and its tokenizer into `folder`, and return the folder.

        The checkpoint has the head that published ones have: an encoder that of a masked language model, a decoder that
        of a language model. So a classifier gets a new head.
        """
        torch.manual_seed(0)
        model: PreTrainedModel = self.auto_class.from_config(self.config())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0.0, 0.15)
        model.save_pretrained(folder)
        byte_tokenizer(self.family).save_pretrained(folder)
        return folder


_FIRST: dict[Family, ObjectiveName] = {
    "decoder": "causal_lm",
    "encoder": "classification",
    "encoder-decoder": "seq2seq_lm",
}


def _kept(kind: str, **settings: Any) -> Callable[[], PreTrainedConfig]:
    """Create the configuration on demand, because importing a model family takes time."""
    return lambda: getattr(hf, f"{kind}Config")(**settings)


def _gemma3_with_pictures() -> PreTrainedConfig:
    return hf.Gemma3Config(
        text_config={**GROUPED, "head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
        image_token_index=5,
        boi_token_index=6,
        eoi_token_index=7,
        **IDS,
    )


_CONFIGURATIONS: dict[Family, dict[str, Callable[[], PreTrainedConfig]]] = {
    "decoder": {
        "Llama": _kept("Llama", **GROUPED),
        "Llama, tied": _kept("Llama", **GROUPED, tie_word_embeddings=True),
        "Qwen2": _kept("Qwen2", **GROUPED, tie_word_embeddings=True),
        "Qwen3": _kept("Qwen3", **GROUPED, head_dim=8),
        "Mistral": _kept("Mistral", **GROUPED, sliding_window=16),
        "Gemma": _kept("Gemma", **GROUPED, head_dim=8),
        "Gemma 2": _kept("Gemma2", **GROUPED, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
        "Gemma 3": _kept("Gemma3Text", **GROUPED, head_dim=8, sliding_window=16, query_pre_attn_scalar=8),
        "Gemma 3, multimodal": _gemma3_with_pictures,
        "Phi": _kept("Phi", **GROUPED),
        "Phi 3": _kept("Phi3", **GROUPED),
        "GPT-2": _kept("GPT2", **GPT, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "GPT-BigCode": _kept("GPTBigCode", **GPT, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "GPT-J": _kept("GPTJ", **GPT, rotary_dim=4),
        "GPT-Neo": _kept(
            "GPTNeo",
            vocab_size=VOCABULARY_SIZE,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=16,
            max_position_embeddings=POSITIONS,
            **IDS,
        ),
        "GPT-NeoX": _kept("GPTNeoX", **NAMED),
        "OPT": _kept(
            "OPT",
            vocab_size=VOCABULARY_SIZE,
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=POSITIONS,
            word_embed_proj_dim=16,
            dropout=0.0,
            **IDS,
        ),
        "BLOOM": _kept("Bloom", vocab_size=VOCABULARY_SIZE, hidden_size=32, n_layer=2, n_head=4, **IDS),
        "Falcon": _kept(
            "Falcon",
            vocab_size=VOCABULARY_SIZE,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            multi_query=True,
            **IDS,
        ),
        "MPT": _kept(
            "Mpt", vocab_size=VOCABULARY_SIZE, d_model=32, n_heads=4, n_layers=2, max_seq_len=POSITIONS, **IDS
        ),
        "StableLM": _kept("StableLm", **GROUPED),
        "StarCoder 2": _kept("Starcoder2", **GROUPED, residual_dropout=0.0, embedding_dropout=0.0),
        "Granite": _kept("Granite", **GROUPED),
        "SmolLM 3": _kept("SmolLM3", **GROUPED),
        "OLMo 2": _kept("Olmo2", **GROUPED),
        "Mixtral": _kept("Mixtral", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
        "Qwen2-MoE": _kept("Qwen2Moe", **GROUPED, **EXPERTS, num_experts=4, shared_expert_intermediate_size=24),
        "Qwen3-MoE": _kept("Qwen3Moe", **GROUPED, **EXPERTS, num_experts=4, head_dim=8, decoder_sparse_step=1),
        "GPT-OSS": _kept(
            "GptOss", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16
        ),
        "Laguna": _kept(
            "Laguna",
            **GROUPED,
            **EXPERTS,
            head_dim=8,
            num_experts=4,
            shared_expert_intermediate_size=24,
            sliding_window=16,
        ),
        "Llama 4": _kept("Llama4Text", **GROUPED, head_dim=8, num_local_experts=4, num_experts_per_tok=2),
        "Phi-MoE": _kept("Phimoe", **GROUPED, num_local_experts=4, num_experts_per_tok=2),
        "Mamba": _kept("Mamba", vocab_size=VOCABULARY_SIZE, hidden_size=32, state_size=4, num_hidden_layers=2, **IDS),
    },
    "encoder-decoder": {
        "T5": _kept("T5", **T5),
        "Flan-T5": _kept("T5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "mT5": _kept("MT5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "UMT5": _kept("UMT5", **T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        "Switch": _kept("SwitchTransformers", **T5, num_experts=4, num_decoder_layers=2),
        "BART": _kept("Bart", **BART),
        "mBART": _kept("MBart", **BART),
        "Pegasus": _kept("Pegasus", **BART),
    },
    "encoder": {
        "BERT": _kept("Bert", **ENCODER),
        "RoBERTa": _kept("Roberta", **{**ENCODER, "max_position_embeddings": POSITIONS + 1}),
        "XLM-RoBERTa": _kept("XLMRoberta", **{**ENCODER, "max_position_embeddings": POSITIONS + 1}),
        "DistilBERT": _kept(
            "DistilBert",
            vocab_size=VOCABULARY_SIZE,
            dim=32,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            max_position_embeddings=POSITIONS,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
            **IDS,
        ),
        "ALBERT": _kept("Albert", **ENCODER, embedding_size=16, classifier_dropout_prob=0.0),
        "ELECTRA": _kept("Electra", **ENCODER, embedding_size=16),
        "MPNet": _kept("MPNet", **{**ENCODER, "max_position_embeddings": POSITIONS + 1}),
        "DeBERTa": _kept(
            "Deberta", **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_dropout=0.0
        ),
        "DeBERTa v2": _kept(
            "DebertaV2", **ENCODER, relative_attention=True, pos_att_type=["p2c", "c2p"], pooler_dropout=0.0
        ),
        "DeBERTa v3": _kept(
            "DebertaV2",
            **ENCODER,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            share_att_key=True,
            position_buckets=16,
            norm_rel_ebd="layer_norm",
            position_biased_input=False,
            pooler_dropout=0.0,
        ),
        "ModernBERT": _kept(
            "ModernBert",
            **NAMED,
            local_attention=16,
            global_attn_every_n_layers=2,
            cls_token_id=BOS_ID,
            sep_token_id=EOS_ID,
        ),
        "Funnel": _kept(
            "Funnel",
            vocab_size=VOCABULARY_SIZE,
            block_sizes=[1, 1],
            num_decoder_layers=1,
            d_model=32,
            n_head=4,
            d_head=8,
            d_inner=48,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            **IDS,
        ),
    },
}

CLASSIFIERS = ("Llama", "Qwen2", "Gemma 3, multimodal", "GPT-2", "OPT", "BLOOM")
"""Decoders that are also tried as classifiers."""

MASKED = ("BERT", "RoBERTa", "DistilBERT", "DeBERTa v3", "ModernBERT")
"""Encoders that are also tried as masked language models."""


def _specimens() -> list[Specimen]:
    made = [
        Specimen(name, family, config, _FIRST[family])
        for family, configurations in _CONFIGURATIONS.items()
        for name, config in configurations.items()
    ]
    decoders, encoders = _CONFIGURATIONS["decoder"], _CONFIGURATIONS["encoder"]
    made += [Specimen(f"{name}, classifier", "decoder", decoders[name], "classification") for name in CLASSIFIERS]
    made += [Specimen(f"{name}, masked LM", "encoder", encoders[name], "masked_lm") for name in MASKED]
    made += [Specimen(f"{name}, body alone", "encoder", encoders[name], "masked_lm", True) for name in MASKED[:3]]
    return made


SPECIMENS = {specimen.name: specimen for specimen in _specimens()}
