"""Row arithmetic of flat shards."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.kernels import RowLayout, mask_rows_, row_segments

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


def rows_by_indexing(layout: RowLayout) -> torch.Tensor:
    """The row of every element, `(matrices, rows, length)` or `(matrices, length, rows)`, flattened."""
    table = torch.arange(layout.total).view(layout.matrices, layout.rows, 1).repeat(1, 1, layout.length)
    return (table.transpose(1, 2) if layout.columns else table).reshape(-1)


layouts = st.builds(RowLayout, st.integers(1, 4), sizes, sizes, st.booleans())


@given(layout=layouts, data=st.data())
def test_a_layout_s_segments_cover_every_element_once_in_its_row(layout: RowLayout, data: st.DataObject) -> None:
    expected = rows_by_indexing(layout)
    start = data.draw(st.integers(0, expected.numel()))
    numel = data.draw(st.integers(0, expected.numel() - start))
    piece = torch.full((numel,), -1)
    segments = layout.segments(start, numel)
    for segment in segments:
        view = segment.view(piece)
        assert view.shape == (segment.rows, segment.width)
        assert (view == -1).all(), "covered twice"
        view.copy_(torch.arange(segment.row, segment.row + segment.rows).unsqueeze(1))
    assert torch.equal(piece, expected[start : start + numel])


@given(layout=layouts, data=st.data())
def test_masking_the_pieces_of_any_layout_is_masking_the_parameter(layout: RowLayout, data: st.DataObject) -> None:
    owner = rows_by_indexing(layout)
    keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=layout.total, max_size=layout.total)))
    values = torch.arange(1.0, owner.numel() + 1)
    values[~keep[owner]] = float("nan")  # a dropped NaN becomes zero
    expected = values.where(keep[owner], torch.tensor(0.0))
    cuts = sorted(data.draw(st.lists(st.integers(0, owner.numel()), max_size=4)))
    for start, stop in zip([0, *cuts], [*cuts, owner.numel()], strict=True):
        assert mask_rows_(values[start:stop], start, layout, keep).numel() == stop - start
    assert torch.equal(values, expected)


def test_a_piece_behind_the_layout_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[5, 9\) ends behind 4 rows of 2"):
        RowLayout(2, 2, 2, columns=True).segments(5, 4)


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
