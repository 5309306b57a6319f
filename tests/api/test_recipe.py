"""Recipes that are built and checked in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cl_dist import Recipe
from cl_dist.config.load import load_recipe
from cl_dist.errors import BadInput
from cl_dist.methods.migu.config import MiguConfig

STREAM: dict[str, Any] = {"tasks": [{"name": "spring", "format": "builtin"}], "max_eval_samples": 8}


def test_changes_are_those_of_the_command_line() -> None:
    changed = Recipe.load("quickstart", method="migu", train={"epochs": 2, "learning_rate": 1e-3}, zero={"stage": 3})
    wanted = ["method.name=migu", "train.epochs=2", "train.learning_rate=0.001", "zero.stage=3"]
    assert changed == load_recipe("quickstart", wanted)[0]
    assert Recipe.load("quickstart", **{"train.epochs": 2}) == load_recipe("quickstart", ["train.epochs=2"])[0]
    whole = Recipe.load("quickstart", method={"name": "migu", "threshold": 0.25}, model="builtin:t5-tiny")
    assert whole.method[0].threshold == 0.25  # type: ignore[attr-defined]
    assert whole.model.name_or_path == "builtin:t5-tiny"
    two = Recipe.load("quickstart", method=[{"name": "migu"}, {"name": "replay"}], output_dir=Path("there"))
    assert ([method.name for method in two.method], two.output_dir) == (["migu", "replay"], "there")


def test_a_recipe_is_built_in_code_and_stored(tmp_path: Path) -> None:
    built = Recipe.build("mine", model="builtin:llama-tiny", stream=STREAM, method="migu", train={"max_length": 64})
    assert built.output_dir == "runs/mine"
    assert built.train.max_target_length == 32, "defaults follow from other settings as in a file"
    assert Recipe.load(built.save(tmp_path / "mine.yaml")) == built


def test_a_method_by_name_keeps_its_settings_and_a_mapping_is_the_whole_method(tmp_path: Path) -> None:
    given = {"name": "migu", "threshold": 0.25}
    path = Recipe.build(model="builtin:llama-tiny", stream=STREAM, method=given).save(tmp_path / "mine.yaml")
    by_name, whole = Recipe.load(path, method="migu"), Recipe.load(path, method={"name": "migu"})
    assert by_name.method[0].threshold == 0.25  # type: ignore[attr-defined]
    assert whole.method[0].threshold == MiguConfig(name="migu").threshold != 0.25  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "builtin:llama-tiny"}, "stream: "),
        ({"model": "builtin:lama-tiny", "stream": STREAM, "train": {"epochs": 0}}, "train.epochs: "),
        ({"model": "builtin:llama-tiny", "stream": STREAM, "trian": {"epochs": 1}}, "trian: "),
        ({"model": "builtin:llama-tiny", "stream": STREAM, "method": "migo"}, "migu"),
        (
            {"model": "builtin:llama-tiny", "stream": STREAM, "train": {"epochs": object()}},
            "train.epochs: .* cannot be",
        ),
    ],
)
def test_what_is_wrong_is_said(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        Recipe.build(**settings)
