"""Fixtures: small models in memory and on disk, built once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cl_dist.config.schema import ModelConfig
from cl_dist.models.export import export_model
from cl_dist.models.load import LoadedModel, load_model

LABELS = 3
SEED = 5

Loader = Callable[..., LoadedModel]


@pytest.fixture(scope="session")
def load(tmp_path_factory: pytest.TempPathFactory) -> Loader:
    """`load(name, objective=..., labels=..., dtype=..., seed=..., gguf_file=...)`: an unsharded model."""
    cache = tmp_path_factory.mktemp("cache")

    def loader(
        name: str | Path,
        objective: str = "auto",
        labels: int = LABELS,
        dtype: torch.dtype = torch.float32,
        seed: int = SEED,
        gguf_file: str | None = None,
    ) -> LoadedModel:
        config = ModelConfig(name_or_path=str(name), objective=objective, gguf_file=gguf_file)  # type: ignore[arg-type]
        return load_model(config, labels, zero3_config=None, dtype=dtype, seed=seed, cache_dir=cache)

    return loader


@pytest.fixture(scope="session")
def folders(load: Loader, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Model folders by name, the encoder with a masked-LM head; read-only."""
    made = {}
    for name, objective in (("llama", "auto"), ("t5", "auto"), ("roberta", "masked_lm")):
        loaded = load(f"builtin:{name}-tiny", objective, seed=77)
        made[name] = tmp_path_factory.mktemp(name)
        export_model(loaded.model, loaded.tokenizer, made[name], dict(loaded.model.named_parameters()))
    return made
