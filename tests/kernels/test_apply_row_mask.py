"""Masked pieces of a flattened matrix against the masked matrix."""

import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cl_dist.kernels import apply_row_mask_, reference

MODULE = sys.modules["cl_dist.kernels.apply_row_mask"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
sizes = st.integers(1, 9)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=sizes, length=sizes, data=st.data())
def test_masking_the_pieces_is_masking_the_matrix(
    device: torch.device, rows: int, length: int, data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, rows * length), max_size=4)))
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)), device=device)
    matrix = torch.arange(1.0, rows * length + 1, device=device).view(rows, length)
    expected = torch.where(keep.unsqueeze(1), matrix, 0.0)
    flat = matrix.clone().view(-1)
    for start, stop in zip([0, *cuts], [*cuts, rows * length], strict=True):
        piece = flat[start:stop]
        assert apply_row_mask_(piece, start, length, keep) is piece
    assert torch.equal(flat.view(rows, length), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("start", "numel", "length"), [(0, 512, 32), (16, 480, 16), (24, 292, 8), (5, 3000, 700), (3, 9, 1)]
)
def test_every_dtype_aligned_or_not(
    device: torch.device, dtype: torch.dtype, start: int, numel: int, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "BLOCK", 256)
    torch.manual_seed(0)
    keep = torch.rand(40, device=device) < 0.3
    around = torch.randn(numel + 32, device=device).to(dtype)
    expected = around.clone()
    reference.apply_row_mask_(expected[16 : 16 + numel], start, length, keep)
    apply_row_mask_(around[16 : 16 + numel], start, length, keep)
    assert torch.equal(around, expected)
    assert (around[:16] != 0).all()


def test_nan_and_inf_in_dropped_rows_become_zero(device: torch.device) -> None:
    flat = torch.tensor([float("nan"), float("inf"), 1.0, float("nan")], device=device)
    apply_row_mask_(flat, 0, 2, torch.tensor([False, True], device=device))
    assert flat[:3].tolist() == [0.0, 0.0, 1.0]
    assert flat[3].isnan()


def test_a_strided_shard_and_mask(device: torch.device) -> None:
    shard, keep = torch.ones(8, device=device), torch.tensor([True, True, False, True], device=device)
    apply_row_mask_(shard[::2], 0, 2, keep[::2])
    assert shard.tolist() == [1, 1, 1, 1, 0, 1, 0, 1]


def test_an_empty_shard(device: torch.device) -> None:
    assert apply_row_mask_(torch.empty(0, device=device), 4, 2, torch.tensor([True, False], device=device)).numel() == 0


@pytest.mark.parametrize("start", [2**31 - 3, 2**33 + 5, 2**33])
def test_positions_beyond_32_bits(device: torch.device, start: int) -> None:
    length = 11008
    first = start // length
    keep = torch.zeros(first + 3, dtype=torch.bool, device=device)
    keep[first + 1] = True
    shard = torch.ones(2 * length, device=device)
    apply_row_mask_(shard, start, length, keep)
    kept = slice((first + 1) * length - start, (first + 2) * length - start)
    assert (shard[kept] == 1).all()
    assert shard.sum() == len(shard[kept])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a shard of more than 2^31 elements needs a GPU")
def test_a_shard_beyond_32_bits(triton_path: torch.device) -> None:
    length = 2**20
    shard = torch.ones(2**31 + length, dtype=torch.bfloat16, device=triton_path)
    keep = torch.ones(len(shard) // length, dtype=torch.bool, device=triton_path)
    keep[-1] = False
    apply_row_mask_(shard, 0, length, keep)
    assert shard[-length - 1] == 1
    assert not shard[-length:].any()


@pytest.mark.parametrize(("start", "length"), [(-1, 1), (0, 0)])
def test_impossible_pieces_are_refused(start: int, length: int) -> None:
    with pytest.raises(ValueError, match="no such piece"):
        apply_row_mask_(torch.zeros(1), start, length, torch.tensor([True]))


def test_a_shard_past_the_last_row_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 2 rows"):
        apply_row_mask_(torch.zeros(3), 2, 2, torch.tensor([True, False]))
