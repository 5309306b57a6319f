"""EWC, LwF and A-GEM with MIGU, killed in the second task or while measuring, end like undisturbed runs."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.faults.test_kill_and_resume import assert_same_end
from tests.recipes import write_recipe
from tests.zygote import Zygote

STEPS = 4
EVERY = 3
EWC = {"name": "ewc", "weight": 100.0, "fisher_samples": 6}
LWF = {"name": "lwf", "top_k": 8}
AGEM = {"name": "agem", "memory_ratio": 0.25}
MIGU = {"name": "migu"}
LORA = {"model": {"lora": {"r": 3, "dropout": 0.1}}}
LAST = ("step", 2 * STEPS)
"""One step of the second task lies between the last checkpoint and the kill."""

CONFIGURATIONS: dict[str, tuple[dict[str, Any], tuple[str, int]]] = {
    "zero3-ewc-in-its-measurement": ({"method": [EWC, MIGU], "zero": {"stage": 3}, **LORA}, ("measurement", 9)),
    "zero2-ewc": ({"method": [EWC, MIGU], "train": {"gradient_accumulation": 2, "micro_batch_size": 2}}, LAST),
    "zero3-lwf": ({"method": [LWF, MIGU], "zero": {"stage": 3}, **LORA}, LAST),
    "zero2-lwf-bf16": ({"method": [LWF, MIGU], "train": {"dtype": "bfloat16", "epochs": 2}}, ("step", 4 * STEPS)),
    "zero2-agem": ({"method": [AGEM, MIGU], "train": {"keep_optimizer": True}, **LORA}, LAST),
    "zero2-s2ft-lwf": ({"method": [{"name": "s2ft", "heads": 0.5, "channels": 0.3}, LWF]}, LAST),
    "zero3-agem": ({"method": [AGEM, MIGU], "zero": {"stage": 3}}, LAST),
    "zero3-inclora-lwf": ({"method": [{"name": "inclora"}, LWF], "zero": {"stage": 3}, **LORA}, LAST),
    "zero2-olora-agem": ({"method": [{"name": "olora"}, AGEM], **LORA}, LAST),
}
"""What is changed, and when a rank is killed."""
FAST = ("zero3-ewc-in-its-measurement",)


def recipe(folder: Path, changes: dict[str, Any]) -> Path:
    """Two tasks of four steps an epoch, a checkpoint after every third."""
    folder.mkdir()
    sections = {"stream": {"max_train_samples": 8 * STEPS}, "checkpoint": {"every_steps": EVERY}, **changes}
    return write_recipe(folder, **sections)


@pytest.mark.parametrize("name", [name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
                                  for name in CONFIGURATIONS])  # fmt: skip
def test_killed_and_resumed(zygote: Zygote, tmp_path: Path, name: str) -> None:
    changes, (moment, count) = CONFIGURATIONS[name]
    undisturbed = recipe(tmp_path / "undisturbed", changes)
    outcome = zygote.run(["run", str(undisturbed), "--debug"], undisturbed.parent, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    announced = [entry for entry in changes["method"] if entry in (EWC, LWF)]
    assert all(f"{entry['name']}: " in outcome.output[0] for entry in announced)
    killed = recipe(tmp_path / "killed", changes)
    fault = {"moment": moment, "on_rank": 1, "count": count}
    outcome = zygote.run(["run", str(killed)], killed.parent, world=2, fault=fault)
    assert outcome.codes[1] == -signal.SIGKILL, "the moment never came"
    assert len(json.loads((killed.parent / "run" / "manifest.json").read_text())["accuracy_matrix"]) == 2
    outcome = zygote.run(["run", str(killed), "--resume", "--debug"], killed.parent, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    assert_same_end(killed.parent / "run", undisturbed.parent / "run")
