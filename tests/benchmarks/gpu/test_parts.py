"""The parts themselves with tiny sizes, in this process; `test_day.py` runs them as a day does."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch

from cl_dist import kernels
from cl_dist.benchmarks.gpu import ceilings, checks, operations, runs, steps
from cl_dist.benchmarks.gpu.findings import overview, tables
from cl_dist.benchmarks.gpu.measuring import DONE, Record, read_part
from cl_dist.benchmarks.gpu.profile import profiled, waits

CPU = torch.device("cpu")
PARTS = {
    "machine": ceilings.measure,
    "kernels": checks.measure,
    "weight-grad": operations.weight_grads,
    "operations": operations.others,
}


def record_of(folder: Path, name: str) -> Record:
    return Record(folder / f"{name}.json", {"part": name, "mode": "CPU mode: x", "device": "a CPU"}, tiny=True)


@pytest.fixture(scope="module")
def day(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All parts without DeepSpeed that measure no whole model."""
    folder, threads = tmp_path_factory.mktemp("day"), torch.get_num_threads()
    torch.set_num_threads(1)  # so small that threads would only wait for each other
    for name, measure in PARTS.items():
        record = record_of(folder, name)
        measure(record, CPU)
        record.end(DONE)
    torch.set_num_threads(threads)
    return {name: read_part(folder / f"{name}.json") for name in PARTS}


@pytest.mark.parametrize("name", list(PARTS))
def test_everything_is_measured(day: dict[str, Any], name: str) -> None:
    found = day[name]["measurements"]
    assert {key: value["failed"] for key, value in found.items() if "failed" in value} == {}
    skipped = [key for key, value in found.items() if "skipped" in value]
    assert skipped == []


def test_the_kernels_are_right_here(day: dict[str, Any]) -> None:
    found = day["kernels"]["measurements"]
    assert [name for name, value in found.items() if not value["ok"]] == []
    assert {name.split()[0] for name in found} >= {
        *("row_magnitude", "masked_weight_grad", "topk_row_masks", "apply_row_mask_", "importance_update_")
    }


@pytest.mark.parametrize("fault", ["wrong row", "not zero", "another bit"])
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    right = kernels.masked_weight_grad
    calls = iter(range(100))

    def spoilt(*arguments: Any, **options: Any) -> Any:
        weight, bias = right(*arguments, **options)
        rows = arguments[2]
        kept, dropped = int(rows[0]), min(set(range(len(weight))) - set(rows.tolist()))
        if fault == "wrong row":
            weight[kept] *= 1.01
        elif fault == "not zero":
            weight[dropped, 0] = 1e-30
        else:
            weight[kept, 0] *= 1 + 1e-6 * next(calls)
        return weight, bias

    monkeypatch.setattr(kernels, "masked_weight_grad", spoilt)
    found = checks._weight_grad(CPU, torch.float32, (40, 48, 32), added=False)
    assert found["ok"] is False
    assert (found["error"] > 1e-3, found["dropped_rows_untouched"], found["same_bits"]) == {
        "wrong row": (True, True, True),
        "not zero": (False, False, True),
        "another bit": (False, True, False),
    }[fault]


def test_ways_race_and_the_fastest_is_named(day: dict[str, Any]) -> None:
    (first, *_) = day["weight-grad"]["measurements"].values()
    assert set(first["seconds"]) >= {"dense", "masked_weight_grad", "gather, product, scatter"}
    assert first["failed_ways"] == {}
    table = next(rows for title, rows in overview(day)["findings"].items() if title.startswith("Ways"))
    over = first["over_dense"]
    assert table[0]["chosen"] == "torch"
    assert table[0]["fastest"] == min(
        set(over) - {"dense", "masked_weight_grad"}, key=lambda name: over[name]["median"]
    )


def test_a_way_that_the_device_does_not_have_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(x: torch.Tensor, dy: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        raise ValueError("no descriptors here")

    monkeypatch.setattr(kernels, "weight_grad_ways", lambda x: {"persistent": refuse})
    record = record_of(tmp_path, "weight-grad")
    operations.weight_grads(record, CPU)
    (first, *_) = record.content["measurements"].values()
    assert first["failed_ways"] == {"persistent": "no descriptors here"}
    assert "persistent" not in first["seconds"]


def test_the_tables_have_every_part(day: dict[str, Any]) -> None:
    text = tables(day)
    assert text.startswith("Device: a CPU. Mode: CPU mode: x.")
    for title in ("Parts", "Measured limits", "Kernels against float64", "Ways to the masked", "Small operations"):
        assert f"**{title}" in text
    assert "WRONG" not in text


def test_a_wrong_kernel_stands_out_in_the_tables() -> None:
    wrong = {"ok": False, "same_bits": True, "error": 0.5}
    day = {"kernels": {"status": "done", "mode": "GPU", "device": "X", "measurements": {"row_magnitude 8x8": wrong}}}
    assert "| WRONG: row_magnitude 8x8 | 0 of 1 | – | 5.0e-01 |" in tables(day)


def test_measurements_that_are_there_are_kept(tmp_path: Path) -> None:
    record = record_of(tmp_path, "x")
    record.measure("first", lambda: {"value": 1})
    again = record_of(tmp_path, "x")
    again.measure("first", lambda: {"value": 2})
    assert again.content["measurements"]["first"]["value"] == 1


def test_a_profile_counts_operators_and_leaves_the_gpu_s_counts_open() -> None:
    a = torch.ones(4)
    found = profiled(lambda: torch.add(torch.add(a, a), a), CPU)
    assert found["operators"] == 2
    assert found["kernels"] is None
    assert waits(a.sum, CPU) == {"waits": {}}


def test_a_twin_with_other_bits_is_found() -> None:
    case = runs.Case("b", (), "a")
    digests = {name: {"sha256": hashlib.sha256(name.encode()).hexdigest()} for name in ("a", "b")}
    assert runs._with_twin(case, digests["b"], {"a": digests["a"]})["equal_bits"] is False
    assert runs._with_twin(case, digests["a"], {"a": digests["a"]})["equal_bits"] is True
    assert "equal_bits" not in runs._with_twin(case, {"failed": "x"}, {"a": digests["a"]})


def test_every_twin_comes_before_its_other_half_with_the_same_settings() -> None:
    seen: dict[str, tuple[str, ...]] = {}
    for case in runs.CASES:
        assert case.twin is None or seen[case.twin] == case.settings
        seen[case.name] = case.settings
    settings = {setting for case in runs.CASES for setting in case.settings}
    assert {f"zero.stage={stage}" for stage in range(4)} <= settings
    assert {"zero.offload=true", "method.name=migu", "method.name=kif"} <= settings


def test_as_many_layers_as_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By arithmetic, since there is no GPU here: a small one gets fewer layers, a large one the whole model."""
    record = Record(tmp_path / "x.json", {}, tiny=False)
    found = {}
    for gib in (8, 24, 139):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, gib=gib: (gib << 30, gib << 30))
        found[gib] = [steps.step_size(record, CPU, tokens, lora).layers for tokens, lora in ((1024, None), (1024, 8))]
    assert found[8][0] < found[24][0] < found[139][0] <= 32
    assert found[139][1] == 32
