from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
import torch

from cl_dist.benchmarks.plan_accuracy import (
    PARTS,
    Case,
    Collectives,
    compared,
    matrix,
    predict,
    storage_bytes,
    tensors_in,
)
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from tests.ranks import run_ranks

HIDDEN, TOKENS = 64, 48
FEW = [
    Case(1, 2, method="kif"),
    Case(2, 2, 8, "migu", accumulation=2),
    Case(3, 2, 8, "kif", checkpointing=True),
    Case(3, 2, dtype="bfloat16"),
    Case(0, 2, method="migu"),
    Case(2, 2, method="migu", update=True),
    Case(3, 2, method="migu"),
]
"""One of every mechanism: whole gradients, buckets, released and gathered weights, low precision, kept rows."""


def rows(cases: list[Case], world: int, hidden: int, tokens: int) -> list[dict[str, Any]]:
    arguments = {"cases": [asdict(case) for case in cases], "hidden": hidden, "tokens": tokens}
    found = run_ranks("tests.benchmarks.plan_jobs:measured", world, arguments, timeout=600)[0]
    return [compared(case, predict(case, hidden, tokens), each) for case, each in zip(cases, found, strict=True)]


def check(row: dict[str, Any]) -> None:
    """The bounds that the documentation promises."""
    name, ratio = row["case"], row["ratio"]
    for part in PARTS:
        if ratio[part] is None:
            assert row["predicted"][part] == 0, (name, part)
        else:
            assert ratio[part] == pytest.approx(1, abs=0.05), (name, part)
    assert ratio["peak"] == pytest.approx(1, abs=0.15), name
    predicted, measured = row["predicted"]["wire"], row["measured"]["wire"]
    for kind in {*predicted, *measured}:
        # Flags and norms, a few bytes each, are left out of the plan.
        assert predicted.get(kind, 0) == pytest.approx(measured.get(kind, 0), rel=0.02, abs=200), (name, kind)


@pytest.mark.slow
def test_a_few_cases() -> None:
    for row in rows(FEW, 2, HIDDEN, TOKENS):
        check(row)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("world", [1, 2])
def test_every_case(world: int, stage: int) -> None:
    for row in rows([case for case in matrix(world) if case.stage == stage], world, 256, 256):
        check(row)


def test_memory_counts_once() -> None:
    flat = torch.empty(100)
    assert storage_bytes([flat[:10], flat[50:], torch.empty(5, dtype=torch.int64)]) == 440
    known: set[int] = set()
    storage_bytes([flat], known)
    assert storage_bytes([flat.view(10, 10)], known) == 0


def test_a_method_s_tensors_are_found() -> None:
    method = Migu(MiguConfig(name="migu"))
    method.keep = {"weight": torch.empty(3)}
    assert [tensor.numel() for tensor in tensors_in(method) if tensor.numel()] == [3]


def test_collectives_are_counted_by_what_they_work_on(tmp_path: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with Collectives() as counter:
            torch.distributed.all_reduce(torch.zeros(10))
            torch.distributed.all_gather_into_tensor(torch.zeros(4), torch.zeros(4))
            torch.distributed.broadcast(torch.zeros(3, dtype=torch.float64), 0)
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()
    assert counter.bytes == {"all_reduce": 40, "all_gather": 16, "broadcast": 24}
