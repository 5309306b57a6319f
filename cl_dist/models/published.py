"""Shapes of the published models that the shipped recipes name, so that a run can be planned before they are here.

Each entry has the facts of the model's config.json that its shape follows from.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import LlamaConfig, PreTrainedConfig, RobertaConfig, T5Config

from cl_dist.config.schema import BUILTIN_FAMILIES, ModelConfig
from cl_dist.config.words import show_path
from cl_dist.errors import BadInput
from cl_dist.models.check import local_folder, read_config

LLAMA2_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""Touvron et al. 2023, arXiv 2307.09288, section 2.2; config.json of meta-llama/Llama-2-7b-hf."""
LLAMA3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
"""Grattafiori et al. 2024, arXiv 2407.21783, table 3; config.json of meta-llama/Meta-Llama-3-8B."""
SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
"""config.json of HuggingFaceTB/SmolLM2-135M-Instruct."""
T5_SMALL: dict[str, Any] = {
    "vocab_size": 32128,
    "d_model": 512,
    "d_kv": 64,
    "d_ff": 2048,
    "num_layers": 6,
    "num_heads": 8,
    "n_positions": 512,
    "decoder_start_token_id": 0,
}
"""Raffel et al. 2020, arXiv 1910.10683, section 3.7; config.json of t5-small."""
T5_LARGE: dict[str, Any] = {**T5_SMALL, "d_model": 1024, "d_ff": 4096, "num_layers": 24, "num_heads": 16}
"""The same; config.json of t5-large."""
ROBERTA_BASE: dict[str, Any] = {
    "vocab_size": 50265,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
}
"""Liu et al. 2019, arXiv 1907.11692, section 4; config.json of roberta-base."""
SHAPES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "meta-llama/Llama-2-7b-hf": (LlamaConfig, LLAMA2_7B),
    "meta-llama/Llama-2-7b-chat-hf": (LlamaConfig, LLAMA2_7B),
    "meta-llama/Meta-Llama-3-8B": (LlamaConfig, LLAMA3_8B),
    "meta-llama/Meta-Llama-3-8B-Instruct": (LlamaConfig, LLAMA3_8B),
    "HuggingFaceTB/SmolLM2-135M-Instruct": (LlamaConfig, SMOLLM2_135M),
    "t5-small": (T5Config, T5_SMALL),
    "t5-large": (T5Config, T5_LARGE),
    "roberta-base": (RobertaConfig, ROBERTA_BASE),
}


def known_config(model: ModelConfig) -> PreTrainedConfig | None:
    """The shape of a published model that is not on this machine; None for what is. Not enough to load a model.

    Raises:
        BadInput: `model` is a folder without config.json, or is neither here nor in `SHAPES`.
    """
    name = model.name_or_path
    if name in BUILTIN_FAMILIES or model.gguf_file is not None:
        return None
    if (folder := local_folder(name)) is not None:
        read_config(folder)
        return None
    if is_cached(name):
        return None
    if name not in SHAPES:
        raise BadInput(
            f"model.name_or_path: {show_path(name)} is not on this machine, and a plan does not ask the network; give "
            "a folder that has the model's config.json"
        )
    kind, facts = SHAPES[name]
    return kind(**facts)


def is_cached(name: str) -> bool:
    """Whether the Hub's cache on this machine has the model's configuration."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:  # no name of a repository
        return False
