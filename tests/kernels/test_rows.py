"""Row arithmetic of flat shards."""

import pytest
import torch
from cl_dist.kernels import row_segments
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
