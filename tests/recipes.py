"""Small recipes for tests that run the real command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


def write_recipe(folder: Path, **changes: Any) -> Path:
    """Write a recipe of two tiny tasks on two ranks into `folder`; `changes` replace or extend its sections."""
    content: dict[str, Any] = {
        "model": {"name_or_path": "builtin:llama-tiny"},
        "stream": {
            "tasks": [{"name": "spring", "format": "builtin"}, {"name": "summer", "format": "builtin"}],
            "max_train_samples": 32,
            "max_eval_samples": 8,
        },
        "method": {"name": "migu"},
        "train": {"micro_batch_size": 4, "learning_rate": 1e-3, "max_length": 64},
        "zero": {"stage": 2},
        "launch": {"processes": 2},
        "output_dir": str(folder / "run"),
    }
    for key, value in changes.items():
        content[key] = {**content.get(key, {}), **value} if isinstance(value, dict) else value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
