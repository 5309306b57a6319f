"""Only what the file names is trained, through a whole run under ZeRO-3; a wrong file is one sentence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from cl_dist.errors import BadInput
from cl_dist.methods.given.names import Entry, matched, read_file
from tests.recipes import write_recipe
from tests.zygote import Zygote

NAMES = """
model.embed_tokens.weight: {rows: [7, 40-119]}
lm_head.weight: {rows: [7, 9-11]}
model.layers.*.mlp.down_proj.weight: {columns: 0-4}
model.norm.weight: all
"""
ROWS = {"model.embed_tokens.weight": {7, *range(40, 120)}, "lm_head.weight": {7, 9, 10, 11}}


def exported(run: Path, task: str) -> dict[str, torch.Tensor]:
    (file,) = (run / "tasks" / task / "model").glob("*.safetensors")
    return load_file(file)


def test_a_run_moves_nothing_else(zygote: Zygote, tmp_path: Path) -> None:
    (tmp_path / "names.yaml").write_text(NAMES)
    recipe = write_recipe(
        tmp_path,
        method={"name": "given", "file": "names.yaml"},
        zero={"stage": 3},
        stream={"tasks": [{"name": name, "format": "builtin"} for name in ("spring", "summer")],
                "max_train_samples": 24, "max_eval_samples": 4},
        eval={"before_training": False},
    )  # fmt: skip
    outcome = zygote.run(["run", str(recipe), "--debug"], tmp_path, world=2, timeout=600)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    before, after = exported(tmp_path / "run", "01-spring"), exported(tmp_path / "run", "02-summer")
    assert not any("kept" in name for name in after)
    for name, weight in after.items():
        moved = weight != before[name]
        rows = set(moved.any(-1).nonzero().reshape(-1).tolist()) if moved.dim() > 1 else set()
        if name == "lm_head.weight":
            assert rows == ROWS[name]
        elif name == "model.embed_tokens.weight":  # of words that the task has
            assert rows
            assert rows <= ROWS[name]
        elif name.endswith("mlp.down_proj.weight"):
            assert moved.any(0).nonzero().reshape(-1).tolist() == [0, 1, 2, 3, 4]
        else:
            assert bool(moved.any()) == (name == "model.norm.weight"), name


def model() -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(3, 5), "table": nn.Embedding(7, 3), "norm": nn.LayerNorm(3)})


def test_patterns_and_ranges(tmp_path: Path) -> None:
    path = tmp_path / "names.yaml"
    path.write_text("'*y.weight': {columns: [2, 0-1, 1]}\ntable.weight: {rows: 6}\nnorm.*: all\n")
    found = matched(read_file(str(path)), model(), str(path))
    assert found == {
        "body.weight": Entry("columns", (0, 1, 2)),
        "table.weight": Entry("rows", (6,)),
        "norm.weight": Entry(None),
        "norm.bias": Entry(None),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 3", "is not a mapping of parameter names"),
        ("body.weight: some", "body.weight: 'some' is not allowed; allowed: {rows:"),
        ("body.weight: {rows: []}", "body.weight: the list of rows is empty"),
        ("body.weight: {rows: [-1]}", "body.weight: -1 is not allowed"),
        ("body.weight: {rows: [3-1]}", "'3-1' is not a range"),
        ("body.weight: {rows: [1.5]}", "1.5 is not allowed"),
        ("body.weights: all", "the model has no trainable parameter body.weights; similar names: body.weight"),
        ("body.weight: all\n'body.*': all", "body.weight is named twice, by body.weight and body."),
        ("norm.weight: {rows: [1]}", "norm.weight of shape (3,) has no rows; allowed for it: all"),
        ("body.weight: {rows: [5]}", "body.weight of shape (5, 3) has no row 5"),
        ("table.weight: {rows: [0-7]}", "table.weight of shape (7, 3) has no row 7"),
    ],
)
def test_wrong_files_are_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "names.yaml"
    path.write_text(text)
    with pytest.raises(BadInput, match=re.escape(message)):
        matched(read_file(str(path)), model(), str(path))
