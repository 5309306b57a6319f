"""Row arithmetic of flat shards."""

import pytest
import torch
from cl_dist.kernels import apply_row_mask_, row_segments
from hypothesis import given
from hypothesis import strategies as st

sizes = st.integers(1, 9)


@given(rows=sizes, length=sizes, data=st.data())
def test_segments_cover_every_element_once_in_its_row(rows: int, length: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, rows * length))
    numel = data.draw(st.integers(0, rows * length - start))
    row_of = torch.arange(rows * length) // length
    piece = torch.full((numel,), -1)
    segments = row_segments(start, numel, length)
    for segment in segments:
        segment.view(piece).copy_(torch.arange(segment.row, segment.row + segment.rows).unsqueeze(1))
    assert torch.equal(piece, row_of[start : start + numel])
    assert len(segments) <= 3
    assert sum(segment.rows * segment.width for segment in segments) == numel


@given(rows=sizes, length=sizes, data=st.data())
def test_masking_the_pieces_is_masking_the_matrix(rows: int, length: int, data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, rows * length), max_size=4)))
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
    matrix = torch.arange(1.0, rows * length + 1).view(rows, length)
    expected = torch.where(keep.unsqueeze(1), matrix, 0.0)
    flat = matrix.clone().view(-1)
    for start, stop in zip([0, *cuts], [*cuts, rows * length], strict=True):
        apply_row_mask_(flat[start:stop], start, length, keep)
    assert torch.equal(flat.view(rows, length), expected)


def test_positions_beyond_32_bits() -> None:
    length = 11008
    start = 2**31 + 5
    first, body = row_segments(start, 3 * length, length)[:2]
    assert (first.row, first.width) == (start // length, length - start % length)
    assert (body.row, body.offset, body.width) == (first.row + 1, first.width, length)


@pytest.mark.parametrize("bad", [(-1, 1, 1), (0, -1, 1), (0, 1, 0)])
def test_impossible_pieces_are_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="no such piece"):
        row_segments(*bad)


def test_nan_and_inf_in_dropped_rows_become_zero() -> None:
    flat = torch.tensor([float("nan"), float("inf"), 1.0, 2.0])
    apply_row_mask_(flat, 0, 2, torch.tensor([False, True]))
    assert flat.tolist() == [0.0, 0.0, 1.0, 2.0]


def test_a_shard_past_the_last_row_is_refused() -> None:
    with pytest.raises(ValueError, match="longer than 2 rows"):
        apply_row_mask_(torch.zeros(3), 2, 2, torch.tensor([True, False]))
