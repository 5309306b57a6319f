"""What a training step costs in collective operations besides DeepSpeed's, on two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.recipes import write_recipe
from tests.zygote import Zygote

OWN = [["all_reduce", 1, "engine/guard.py"], ["all_reduce", 5, "engine/stop.py"]]
"""Is everything finite; and: stop, loss, targets, checkpoint due, log not written."""


def steps(zygote: Zygote, folder: Path, **recipe: Any) -> list[list[list[Any]]]:
    """The operations of each step of a run that is not the first one of a task."""
    log = folder / "operations.jsonl"
    path = write_recipe(folder, **recipe)
    fault = {"module": "tests.distributed.step_collectives", "log": str(log)}
    outcome = zygote.run(["run", str(path)], folder, world=2, fault=fault)
    assert outcome.codes == [0, 0], outcome.output
    return [json.loads(line) for line in log.read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "more"), [("sequential", 0), ("migu", 1), ("kif", 0)])
@pytest.mark.parametrize("stage", [2, 3])
def test_a_step_costs_two_small_reductions_and_a_method_at_most_one(
    zygote: Zygote, tmp_path: Path, name: str, more: int, stage: int
) -> None:
    found = steps(zygote, tmp_path, method={"name": name}, zero={"stage": stage}, train={"epochs": 2})
    inside = found[-1]  # of the second task: MIGU's first one has no masks
    replaced = "sharding/compact.py"  # what stands where DeepSpeed's own was
    others = [operation for operation in inside if operation not in OWN and operation[2] != replaced]
    assert [operation for operation in inside if operation in OWN] == OWN
    assert [operation[0] for operation in others] == ["all_reduce"] * more, others
    assert all("migu" in operation[2] for operation in others), others
