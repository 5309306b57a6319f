"""Small models and their set-ups for the tests of planning."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import LlamaConfig, PreTrainedConfig

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import LoraConfig, Recipe, ZeroConfig
from cl_dist.methods.config import MethodConfig
from cl_dist.methods.sequential.config import SequentialConfig
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape, describe_model

LLAMA2_7B = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}


def llama(**settings: Any) -> LlamaConfig:
    """A Llama's configuration, small by default."""
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaConfig(**{"vocab_size": 128, "tie_word_embeddings": False, **small, **ids, **settings})


def planned(
    world: int = 2,
    stage: int = 0,
    lora: int | None = None,
    config: PreTrainedConfig | None = None,
    zero: dict[str, Any] | None = None,
    device: str = "cpu",
    methods: Sequence[MethodConfig] = (SequentialConfig(),),
    **train: Any,
) -> tuple[Setup, ModelShape]:
    """A set-up on `world` ranks, and its model."""
    quick, _ = load_recipe("quickstart")
    raw = {"zero_optimization": zero} if zero else {}
    settings = {"micro_batch_size": 2, "max_length": 32, "max_target_length": 4, **train}
    recipe: Recipe = replace(
        quick,
        model=replace(quick.model, name_or_path="a Llama", lora=LoraConfig(r=lora) if lora else None),
        train=replace(quick.train, **settings),
        zero=ZeroConfig(stage=stage, deepspeed=raw),  # type: ignore[arg-type]
        method=tuple(methods),
    )
    setup = Setup(recipe, 1, world, device)  # type: ignore[arg-type]
    return setup, describe_model(recipe, config or llama())
