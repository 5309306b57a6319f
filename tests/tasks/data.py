"""Small data sets on disk, and where the real ones are."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cl_dist.config.schema import StreamConfig, TaskConfig, TrainConfig
from cl_dist.tasks.stream import load_stream
from cl_dist.tasks.types import Task

REAL_DATA = Path(os.environ.get("CL_DIST_TEST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))

needs_real_data = pytest.mark.skipif(
    not REAL_DATA.is_dir(), reason=f"no benchmark data in {REAL_DATA} (set CL_DIST_TEST_DATA)"
)

ANSWERS = ("yes", "no")


def write_json(path: Path, content: object) -> Path:
    """Write a JSON file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def write_lines(path: Path, lines: Sequence[str]) -> Path:
    """Write a text file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def records(prompt_field: str, answer_field: str, count: int, tag: str = "") -> list[dict[str, str]]:
    """`count` records with prompts "question <tag><i>" and alternating answers."""
    return [{prompt_field: f"question {tag}{i}", answer_field: ANSWERS[i % 2]} for i in range(count)]


def as_lines(items: Sequence[object]) -> list[str]:
    """JSON Lines of some records."""
    return [json.dumps(item) for item in items]


def load_one(
    recipe_dir: Path,
    name: str = "task",
    stream: dict[str, Any] | None = None,
    train: TrainConfig | None = None,
    **task: Any,
) -> Task:
    """Load a stream of one task."""
    config = StreamConfig(tasks=(TaskConfig(name=name, **task),), **(stream or {}))
    (loaded,) = load_stream(config, recipe_dir, train or TrainConfig())
    return loaded
