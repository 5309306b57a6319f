from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cl_dist.benchmarks.growth import tasks
from cl_dist.config.load import load_recipe
from cl_dist.tasks.stream import load_stream


def test_the_stream_has_one_sample_per_task(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tasks.content(12, "kif", tmp_path)))
    recipe, folder = load_recipe(str(tmp_path / "recipe.yaml"), [])
    stream = load_stream(recipe.stream, folder, recipe.train)
    assert [task.name for task in stream] == [f"task-{number:03}" for number in range(12)]
    assert {(len(task.train), len(task.evaluation)) for task in stream} == {(1, 1)}
    assert len({task.train[0].answer for task in stream}) == 12


@pytest.mark.slow
def test_a_row_of_a_real_run(tmp_path: Path) -> None:
    row = tasks.measure(3, "kif", tmp_path)
    assert {column for panel in tasks.PANELS for column in panel.lines} <= set(row)
    assert all(value > 0 for value in row.values())
    assert row["whole, s"] > row["tasks"] * (row["train, s a task"] + row["score, s a task"])
    assert row["a score, s"] * 6 == pytest.approx(row["score, s a task"] * 3)
    # KIF's two states and the previous weights, in float32, and the masters.
    assert row["state, MiB"] > row["run folder, MiB"] / 10
