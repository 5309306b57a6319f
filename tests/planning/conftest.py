"""Tiny models and set-ups to plan."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from cl_dist.config.load import load_recipe
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape, describe_model

Planned = Callable[..., tuple[Setup, ModelShape]]
LORA = "model.lora={r: 3}"


@pytest.fixture(scope="session")
def planned() -> Planned:
    """The set-up and the model of the quickstart with some changes, on some ranks."""

    @cache
    def build(*changes: str, nodes: int = 1, ranks: int = 2, device: str = "cuda") -> tuple[Setup, ModelShape]:
        recipe, _ = load_recipe("quickstart", changes)
        return Setup(recipe, nodes, ranks, device), describe_model(recipe)  # type: ignore[arg-type]

    return build
