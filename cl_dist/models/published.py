"""Shapes of published models that need a licence to download, so that a run can be planned before they are here.

Each entry has the facts of the model's config.json that its shape follows from.
"""

from __future__ import annotations

from typing import Any

from huggingface_hub import try_to_load_from_cache
from transformers import LlamaConfig, PreTrainedConfig

from cl_dist.config.schema import BUILTIN_FAMILIES, ModelConfig
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
SHAPES: dict[str, dict[str, Any]] = {
    "meta-llama/Llama-2-7b-hf": LLAMA2_7B,
    "meta-llama/Llama-2-7b-chat-hf": LLAMA2_7B,
    "meta-llama/Meta-Llama-3-8B": LLAMA3_8B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA3_8B,
}


def known_config(model: ModelConfig) -> PreTrainedConfig | None:
    """The shape of a published model that is not on this machine; None for all others. Not enough to load a model.

    Raises:
        BadInput: `model` is a folder without config.json, or cannot be a model at all.
    """
    if model.name_or_path in BUILTIN_FAMILIES or model.gguf_file is not None:
        return None
    if (folder := local_folder(model.name_or_path)) is not None:
        read_config(folder)
        return None
    if model.name_or_path not in SHAPES or is_cached(model.name_or_path):
        return None
    return LlamaConfig(**SHAPES[model.name_or_path])


def is_cached(name: str) -> bool:
    """Whether the Hub's cache on this machine has the model's configuration."""
    return isinstance(try_to_load_from_cache(name, "config.json"), str)
