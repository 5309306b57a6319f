from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.kernels import RowLayout
from cl_dist.sharding.packing import KeptRows, Packing

LAYOUTS = st.builds(
    RowLayout, st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.booleans()
)  # matrices, rows, elements of a row, stored transposed


def travels(layout: RowLayout, keep: torch.Tensor) -> torch.Tensor:
    """Which elements of the flattened parameter are in kept rows, from the definition of the layout alone."""
    of_matrix = keep.view(layout.matrices, layout.rows, 1).expand(-1, -1, layout.length)
    return (of_matrix.transpose(1, 2) if layout.columns else of_matrix).reshape(-1)


@given(data=st.data(), layouts=st.lists(st.none() | LAYOUTS, min_size=1, max_size=4))
def test_any_piece_is_packed_and_put_back(data: st.DataObject, layouts: list[RowLayout | None]) -> None:
    """Whatever is in the flat tensor (masked, not masked, padding), and wherever it is cut."""
    parameters: list[tuple[int, int, KeptRows | None]] = []
    masks, start = [], 0
    for layout in layouts:
        if layout is None:
            numel = data.draw(st.integers(1, 9))
            parameters.append((start, numel, None))
            masks.append(torch.ones(numel, dtype=torch.bool))
        else:
            keep = torch.tensor(data.draw(st.lists(st.booleans(), min_size=layout.total, max_size=layout.total)))
            numel, rows = layout.total * layout.length, np.flatnonzero(keep.numpy())
            parameters.append((start, numel, KeptRows("w", layout, rows, torch.from_numpy(rows))))
            masks.append(travels(layout, keep))
        padding = data.draw(st.integers(0, 2))
        masks.append(torch.zeros(padding, dtype=torch.bool))
        start += numel + padding
    mask, packing = torch.cat(masks), Packing(parameters)
    first = data.draw(st.integers(0, start))
    last = data.draw(st.integers(first, start))
    inside = mask[first:last]
    piece = torch.arange(start, dtype=torch.float32)[first:last]

    packed = packing.take(piece, first)
    assert packing.size(first, last) == int(inside.sum())
    assert torch.equal(packed, piece[inside])

    other = torch.full_like(piece, -1.0)
    packing.put(packed, other, first, zero_dropped=False)
    assert torch.equal(other, torch.where(inside, piece, -1.0))
    packing.add(packed, other, first)
    assert torch.equal(other, torch.where(inside, 2 * piece, -1.0))
    packing.put(packed, other, first, zero_dropped=True)
    covered = torch.zeros(start, dtype=torch.bool)
    for begin, numel, _ in parameters:
        covered[begin : begin + numel] = True
    dropped = covered[first:last] & ~inside
    assert torch.equal(other, torch.where(inside, piece, torch.where(dropped, 0.0, -1.0)))
