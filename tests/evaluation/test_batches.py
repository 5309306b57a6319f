"""Batches and their distribution over passes and ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cl_dist.evaluation.batches import PASS_BATCHES, cut_batches, cut_pass, deal_batches, plan_passes

LENGTHS = st.lists(st.integers(1, 30), min_size=1, max_size=40)


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


@given(st.lists(LENGTHS, min_size=1, max_size=4), st.integers(1, 9), st.integers(1, 5), st.booleans())
def test_ranks_share_the_batches_of_a_pass(lengths: list[list[int]], size: int, world: int, synced: bool) -> None:
    batches = cut_pass(lengths, [size] * len(lengths))
    for task, own in enumerate(lengths):
        assert sorted(b.indices for b in batches if b.task == task) == sorted(cut_batches(own, size))
    costs = [len(b.indices) * max(lengths[b.task][i] for i in b.indices) for b in batches]
    assert costs == sorted(costs, reverse=True)
    dealt = [deal_batches(batches, rank, world, synced) for rank in range(world)]
    counted = [(batch.task, batch.indices) for own in dealt for batch in own if batch.counted]
    assert sorted(counted) == sorted((batch.task, batch.indices) for batch in batches)
    rounds = {len(own) for own in dealt}
    assert max(rounds) == -(-len(batches) // world)
    assert len(rounds) == 1 or not synced
    assert synced or all(batch.counted for own in dealt for batch in own)


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 5))
def test_a_pass_has_enough_batches_and_no_task_too_many(batches: list[int], world: int) -> None:
    passes = plan_passes(batches, world)
    assert [task for each in passes for task in each] == list(range(len(batches)))
    enough = PASS_BATCHES * world
    assert all(sum(batches[task] for task in each) >= enough for each in passes[:-1])
    assert all(sum(batches[task] for task in each[:-1]) < enough for each in passes)


def test_no_rank_always_gets_the_costliest() -> None:
    batches = cut_pass([[9, 7], [8], [6, 5]], [1, 1, 1])
    assert [(batch.task, batch.indices) for batch in batches] == [(0, [0]), (1, [0]), (0, [1]), (2, [0]), (2, [1])]
    assert deal_batches(batches, 0, 2, synced=False) == [batches[0], batches[3], batches[4]]
    assert deal_batches(batches, 1, 2, synced=False) == [batches[1], batches[2]]
