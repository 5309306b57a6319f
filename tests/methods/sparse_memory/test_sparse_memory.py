"""Sparse memory fine-tuning through whole runs, one of them killed; what is wrong with it is one sentence."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.faults.test_kill_and_resume import assert_same_end
from tests.methods.given.test_given import exported
from tests.recipes import write_recipe
from tests.zygote import Zygote

STEPS, ROWS = 6, 5
RECORDS = [{"prompt": f"question {number} about the {word}", "answer": word} for number, word in enumerate("abcdefgh")]


def write(folder: Path, **method: Any) -> Path:
    """A state is saved after every fourth step."""
    (folder / "other.jsonl").write_text("".join(json.dumps(each) + "\n" for each in RECORDS))
    return write_recipe(
        folder,
        method={"name": "sparse_memory", "background": "other.jsonl", "rows": ROWS, "samples": 6, **method},
        stream={"max_train_samples": 8 * STEPS, "max_eval_samples": 4},
        train={"weight_decay": 0.1},
        checkpoint={"every_steps": 4},
        eval={"before_training": False},
    )


@pytest.fixture(scope="module")
def run(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("sparse")
    outcome = zygote.run(["run", str(write(folder)), "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    return folder / "run"


def test_only_rows_that_were_chosen_move_and_metrics_say_so(run: Path) -> None:
    before, after = exported(run, "01-spring"), exported(run, "02-summer")
    (table,) = [name for name in before if not torch.equal(before[name], after[name])]
    assert "embed" in table
    counts = load_file(next((run / "tasks" / "02-summer").glob("kept_rows*")))
    (kept,) = counts.values()
    moved = (before[table] != after[table]).any(1)
    assert torch.equal(moved, kept > 0)
    assert kept.sum() == STEPS * ROWS
    assert 0 < moved.sum() < len(moved)
    metrics = json.loads((run / "metrics.json").read_text())
    whole = sum(weight.numel() for weight in before.values())
    assert metrics["kept_share"]["summer"] == pytest.approx(ROWS * before[table].shape[1] / whole)
    held = 16 * before[table].numel() / 2  # gradient, master and two moments of the table, on two ranks
    assert [abs(each / held - 1) < 0.01 for each in metrics["state_bytes_per_rank"]] == [True, True]


def test_killed_and_resumed(zygote: Zygote, run: Path, tmp_path: Path) -> None:
    path = write(tmp_path)
    fault = {"moment": "step", "on_rank": 0, "count": STEPS + 6}
    outcome = zygote.run(["run", str(path)], tmp_path, world=2, fault=fault)
    assert outcome.codes[0] == -signal.SIGKILL
    outcome = zygote.run(["run", str(path), "--resume", "--debug"], tmp_path, world=2)
    assert outcome.codes == [0, 0], outcome.output
    assert_same_end(tmp_path / "run", run)
    one, other = (json.loads((folder / "metrics.json").read_text()) for folder in (tmp_path / "run", run))
    assert one["kept_share"] == other["kept_share"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"background": None}, "method.background: "),
        ({"background": "absent.jsonl"}, "absent.jsonl does not exist"),
        ({"parameters": ["*.nothing"]}, "method.parameters: *.nothing matches no trainable embedding table; the model"),
        ({"parameters": []}, "method.parameters: the list is empty; allowed: input, or at least one pattern"),
        ({"rows": 0}, "method.rows: 0 is not allowed"),
    ],
)
def test_bad_input_is_one_sentence(zygote: Zygote, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    outcome = zygote.run(["run", str(write(tmp_path, **changes))], tmp_path, world=1, timeout=120)
    assert outcome.codes == [2], outcome.output
    assert message in outcome.output[0]
    assert "Traceback" not in outcome.output[0]
