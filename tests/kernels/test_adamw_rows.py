"""A step on kept rows against torch's fused AdamW on everything, followed by putting back the other rows."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cl_dist.kernels import AdamWSettings, AdamWState, RowLayout, RowPiece, adamw_rows_, reference
from tests.ranks import REPOSITORY

MODULE = sys.modules["cl_dist.kernels.adamw_rows"]
USUAL = AdamWSettings(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-6, weight_decay=0.1)
sizes = st.integers(1, 40)


def state(numel: int, device: torch.device, dtype: torch.dtype = torch.float32) -> AdamWState:
    torch.manual_seed(numel)
    param, grad, average, square = (torch.randn(numel).to(device, dtype) for _ in range(4))
    return AdamWState(param, grad, average, square.square())


def masked(offset: int, numel: int, start: int, layout: RowLayout, device: torch.device) -> RowPiece:
    """A piece of which three rows in ten are kept."""
    keep = torch.rand(layout.total, generator=torch.Generator().manual_seed(layout.total)) < 0.3
    return RowPiece(offset, numel, start, layout, keep.to(device))


def check(given_: AdamWState, pieces: Sequence[RowPiece], chosen: AdamWSettings = USUAL, steps: int = 3) -> None:
    """The same bits, on a GPU's kernels up to the rounding of a few operations; and what is not kept keeps its bits."""
    kept = torch.zeros(given_.param.shape, dtype=torch.bool, device=given_.param.device)
    for piece in pieces:
        kept[piece.offset : piece.offset + piece.numel] = piece.kept(piece.offset, piece.numel)
    ours, right = (AdamWState(*(tensor.clone() for tensor in given_)) for _ in range(2))
    for count in range(1, steps + 1):
        step = torch.tensor(float(count), device=given_.param.device)
        before = AdamWState(*(tensor.clone() for tensor in right))
        for new, old in zip(ours, right, strict=True):
            new.copy_(old)
        reference.adamw_rows_(right, step, pieces, chosen)
        adamw_rows_(ours, step, pieces, chosen)
        for new, old, expected in zip(ours, before, right, strict=True):
            if MODULE.path_of(new) == "triton":
                bound = 4 * torch.finfo(new.dtype).eps * (expected.abs() + old.abs() + (expected - old).abs())
                assert ((new.double() - expected.double()).abs() <= bound).all()
                assert torch.equal(new[~kept], old[~kept])
            else:
                assert torch.equal(new, expected)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(rows=3, length=4096, cut=5, more=3)
@example(rows=1, length=1, cut=0, more=0)
@given(rows=sizes, length=sizes, cut=st.integers(0, 30), more=st.integers(0, 40))
def test_a_piece_between_others(device: torch.device, rows: int, length: int, cut: int, more: int) -> None:
    """It may begin and end within a row; what is before it is stepped as a whole, what is behind it not at all."""
    layout = RowLayout(1, rows, length)
    start = min(cut, rows * length)
    numel = max(0, rows * length - start - cut)
    check(state(17 + numel + more, device), [RowPiece(0, 17), masked(17, numel, start, layout, device)], steps=1)


@pytest.mark.parametrize(
    ("layout", "start", "numel"),
    [(RowLayout(1, 40, 700), 5, 20000), (RowLayout(3, 8, 32), 0, 768), (RowLayout(2, 24, 16, columns=True), 5, 740),
     (RowLayout(1, 33, 50, columns=True), 0, 1650), (RowLayout(1, 600, 1), 3, 590)],
)  # fmt: skip
def test_layouts_over_several_steps(device: torch.device, layout: RowLayout, start: int, numel: int) -> None:
    check(state(numel + 64, device), [masked(16, numel, start, layout, device), RowPiece(16 + numel, 48)])


@pytest.mark.parametrize(
    "chosen",
    [USUAL._replace(weight_decay=0.0), USUAL._replace(beta1=0.4), USUAL._replace(beta1=0.0, eps=1e-2)],
)
def test_settings(device: torch.device, chosen: AdamWSettings) -> None:
    check(state(3001, device), [masked(0, 3000, 0, RowLayout(1, 30, 100), device)], chosen)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_stepped_by_torch(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "COMPACT", 1000)  # several pieces
    cpu = torch.device("cpu")
    check(state(4100, cpu, dtype), [RowPiece(0, 50), masked(50, 4000, 7, RowLayout(1, 50, 100), cpu)])


def test_bfloat16_on_a_gpu(triton_path: torch.device) -> None:
    check(state(4096, triton_path, torch.bfloat16), [masked(0, 4096, 0, RowLayout(1, 64, 64), triton_path)])


def test_arithmetic_unlike_torchs_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no variant gives torch's bits, torch's own operation steps copies of the kept rows."""
    monkeypatch.setattr(MODULE, "_variant_like_torch", lambda: None)
    monkeypatch.setattr(MODULE, "COMPACT", 1000)
    cpu = torch.device("cpu")
    check(state(4100, cpu), [RowPiece(0, 50), masked(50, 4043, 7, RowLayout(1, 50, 100), cpu)])


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_older_processors_round_in_another_way(capability: str) -> None:
    """Torch's kernels without fused multiply-add, and with narrower vectors."""
    command = [sys.executable, "-c", "from tests.kernels.test_adamw_rows import on_this_processor as f; f()"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    run = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def on_this_processor() -> None:
    """What `test_older_processors_round_in_another_way` runs."""
    assert MODULE._variant_like_torch() is not None
    cpu = torch.device("cpu")
    check(state(20011, cpu), [masked(0, 20011, 5, RowLayout(1, 30, 700), cpu)])


def test_several_threads_give_the_same_bits() -> None:
    cpu, layout = torch.device("cpu"), RowLayout(1, 100, 1000)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        check(state(100_003, cpu), [masked(0, 99_000, 0, layout, cpu), RowPiece(99_000, 1003)])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("pieces", "message"),
    [([RowPiece(3, 8)], "is no piece of 10 elements"),
     ([RowPiece(0, 8, 3, RowLayout(1, 2, 5), torch.tensor([True, False]))], "ends at 11 of 2 rows"),
     ([RowPiece(0, 8, 0, RowLayout(1, 2, 5), torch.tensor([True]))], "with a mask for 1")],
)  # fmt: skip
def test_impossible_pieces_are_refused(pieces: list[RowPiece], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        adamw_rows_(state(10, torch.device("cpu")), torch.tensor(1.0), pieces, USUAL)


def test_tensors_that_do_not_go_together_are_refused() -> None:
    good = state(10, torch.device("cpu"))
    for bad in (good._replace(grad=good.grad.double()), good._replace(exp_avg=good.exp_avg[:9])):
        with pytest.raises(ValueError, match="param, grad and moments"):
            adamw_rows_(bad, torch.tensor(1.0), [], USUAL)
