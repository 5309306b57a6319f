"""Batches, their distribution over ranks and padding."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.evaluation.batches import cut_batches, deal_batches, pad_side

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)
CPU = torch.device("cpu")


@given(LENGTHS, st.integers(1, 9))
def test_batches_cover_every_sample_once_longest_first(lengths: list[int], batch_size: int) -> None:
    batches = cut_batches(lengths, batch_size)
    flat = [index for batch in batches for index in batch]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[index] for index in flat] == sorted(lengths, reverse=True)
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == -(-len(lengths) // batch_size)
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_equal_lengths_keep_file_order() -> None:
    assert cut_batches([5, 7, 5, 7], 3) == [[1, 3], [0, 2]]
    assert cut_batches([], 3) == []


@given(LENGTHS, st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_ranks_share_the_batches(lengths: list[int], batch_size: int, world: int, synced: bool) -> None:
    batches = cut_batches(lengths, batch_size)
    dealt = [deal_batches(batches, rank, world, synced) for rank in range(world)]
    counted = [batch.indices for own in dealt for batch in own if batch.counted]
    assert sorted(counted) == sorted(batches)
    rounds = {len(own) for own in dealt}
    assert max(rounds) == -(-len(batches) // world)
    assert len(rounds) == 1 or not synced
    assert synced or all(batch.counted for own in dealt for batch in own)


def test_pad_side() -> None:
    ids, mask = pad_side([[1, 2, 3], [4]], 9, "left", CPU)
    assert ids.tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad_side([[1, 2, 3], [4]], 9, "right", CPU)
    assert ids.tolist() == [[1, 2, 3], [4, 9, 9]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]
