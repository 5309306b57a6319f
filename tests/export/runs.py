"""Run folders with saved models, written by the code that writes those of real runs, without the training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import PeftModel

from cl_dist.config.files import cache_folder
from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.models.export import export_model
from cl_dist.models.load import load_model
from cl_dist.models.lora import add_lora
from cl_dist.models.structure import base_model
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder

LABELS = 4
"""Of the built-in tasks."""


def write_run(
    path: Path, model: str | Path, tasks: Sequence[str] = ("spring", "summer"), done: int = 2, **settings: Any
) -> Path:
    """A run of built-in tasks that has finished `done` of them, each with a model of its own."""
    lora, steps = settings.pop("lora", None), settings.pop("steps", (2,) * len(tasks))
    content = {
        "model": {"name_or_path": str(model), **({} if lora is None else {"lora": lora})},
        "stream": {"tasks": [{"name": name, "format": "builtin"} for name in tasks], "max_train_samples": 16},
        "method": {"name": "sequential"},
        "train": {"max_length": 64},
        "output_dir": str(path),
        **settings,
    }
    path.mkdir(parents=True)
    written = path.with_suffix(".yaml")
    written.write_text(yaml.safe_dump(content))
    recipe = load_recipe(str(written))[0]
    count = len(tasks)
    manifest = Manifest(
        tasks=tuple(tasks),
        world_size=2,
        zero_stage=2,
        status="finished" if done == count else "running",
        completed=done,
        accuracy_matrix=tuple(tuple((i * count + j) / 10 for j in range(count)) for i in range(done + 1)),
        scoring={name: {"metric": "exact_match", "mode": "likelihood", "samples": 8} for name in tasks},
        timings=tuple({"steps": each, "train_seconds": 1.0, "evaluate_seconds": 1.0} for each in steps[:done]),
    )
    folder = RunFolder(path)
    Ledger(folder, manifest, writer=True).start(dump_recipe(recipe))
    for index in range(done):
        _save(folder.task(index, tasks[index]).model, recipe, seed=index)
    return path


def _save(folder: Path, recipe: Any, seed: int) -> None:
    """Write the recipe's model, or its adapter, as training could leave it."""
    loaded = load_model(recipe.model, LABELS, zero3_config=None, dtype=torch.float32, seed=5, cache_dir=cache_folder())
    model: Any = loaded.model
    if recipe.model.lora is not None:
        model = add_lora(base_model(loaded.model), recipe.model.lora, loaded.objective, 5, loaded.drawn)
        assert isinstance(model, PeftModel)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        name: (weight + 0.05 * torch.randn(weight.shape, generator=generator)).detach()
        for name, weight in model.named_parameters()
    }
    folder.mkdir(parents=True)
    export_model(model, loaded.tokenizer, folder, weights)
