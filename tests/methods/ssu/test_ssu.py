"""Source-shielded updates through a whole run; what is wrong with the calibration data is one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.methods.given.test_given import exported
from tests.recipes import write_recipe
from tests.zygote import Zygote

RECORDS = [{"prompt": f"question {number} about the {word}", "answer": word} for number, word in enumerate("abcdefgh")]


def write(folder: Path, *, records: Any = RECORDS, **method: Any) -> Path:
    (folder / "source.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    return write_recipe(
        folder,
        method={"name": "ssu", "calibration": "source.jsonl", "samples": 5, **method},
        zero={"stage": 2},
        stream={"tasks": [{"name": name, "format": "builtin"} for name in ("spring", "summer")],
                "max_train_samples": 24, "max_eval_samples": 4},
        eval={"before_training": False},
    )  # fmt: skip


def frozen_columns(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> dict[str, int]:
    """Numbers of columns without a changed element, by name of the matrix inside the blocks."""
    return {
        name: int((weight == before[name]).all(0).sum())
        for name, weight in after.items()
        if ".layers." in name and weight.ndim == 2
    }


def test_a_run_freezes_half_of_the_columns(zygote: Zygote, tmp_path: Path) -> None:
    outcome = zygote.run(["run", str(write(tmp_path)), "--debug"], tmp_path, world=2, timeout=600)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    before, after = exported(tmp_path / "run", "01-spring"), exported(tmp_path / "run", "02-summer")
    counts = frozen_columns(before, after)
    assert len(counts) == 14
    assert counts == {name: before[name].shape[1] // 2 for name in counts}
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    whole = sum(weight.numel() for weight in after.values())
    trained = whole - sum(after[name].shape[0] * number for name, number in counts.items())
    assert metrics["kept_share"] == {"spring": trained / whole, "summer": trained / whole}
    # Each of two ranks has half of the float32 gradient, the masters and two moments, apart from padding.
    assert [abs(held / (16 * trained / 2) - 1) < 0.01 for held in metrics["state_bytes_per_rank"]] == [True, True]
    others = [name for name in after if name not in counts and torch.equal(before[name], after[name])]
    assert others == []


@pytest.mark.parametrize(
    ("method", "records", "message"),
    [
        ({"calibration": None}, RECORDS, "method.calibration: "),
        ({"calibration": "absent.jsonl"}, RECORDS, "absent.jsonl does not exist"),
        ({}, [{"prompt": "a question"}], "method.calibration: "),
        ({}, [], "method.calibration: "),
        ({"samples": 0}, RECORDS, "method.samples: "),
        ({"keep": 1.0}, RECORDS, "method.keep: "),
    ],
)
def test_bad_input_is_one_sentence(
    zygote: Zygote, tmp_path: Path, method: dict[str, Any], records: Any, message: str
) -> None:
    outcome = zygote.run(["run", str(write(tmp_path, records=records, **method))], tmp_path, world=1, timeout=120)
    assert outcome.codes == [2]
    assert message in outcome.output[0]
    assert "Traceback" not in outcome.output[0]
    assert not (tmp_path / "run").exists()


def test_adapters_are_refused(zygote: Zygote, tmp_path: Path) -> None:
    recipe = write(tmp_path)
    command = ["run", str(recipe), "--set", "model.lora={r: 2}"]
    outcome = zygote.run(command, tmp_path, world=1, timeout=120)
    assert outcome.codes == [2]
    assert "ssu chooses among the model's own weights, which model.lora freezes" in outcome.output[0]


def test_other_calibration_data_is_another_run(zygote: Zygote, tmp_path: Path) -> None:
    recipe = write(tmp_path)
    assert zygote.run(["run", str(recipe), "--set", "stream.max_train_samples=4"], tmp_path, world=1).codes == [0]
    moved = tmp_path / "elsewhere.jsonl"
    moved.write_text((tmp_path / "source.jsonl").read_text())
    again = [
        "run",
        str(recipe),
        "--resume",
        "--set",
        "stream.max_train_samples=4",
        "--set",
        f"method.calibration={moved}",
    ]
    assert zygote.run(again, tmp_path, world=1).codes == [0]
    moved.write_text(json.dumps(RECORDS[0]) + "\n")
    outcome = zygote.run(again, tmp_path, world=1)
    assert outcome.codes == [2]
    assert "the training data of method.calibration" in outcome.output[0]
