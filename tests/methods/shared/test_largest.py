"""The largest elements over all ranks: the same as sorting them in one place, wherever the shards are cut."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_dist.methods.shared import largest as module
from cl_dist.methods.shared.largest import ALONE, Cut, Ranks, largest
from cl_dist.sharding import Shard

INFINITY, NAN = float("inf"), float("nan")
SCORES = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3e38, INFINITY, -INFINITY, NAN, -NAN]),
    st.floats(-2.0, 2.0, width=32),
)
Cuts = list[dict[str, Cut]]


def sorted_mask(scores: torch.Tensor, count: int) -> torch.Tensor:
    """The truth: NaN first, then by magnitude, then by place."""
    keys = [(-1.0, -INFINITY) if score != score else (0.0, -abs(score)) for score in scores.tolist()]
    order = sorted(range(len(keys)), key=lambda place: (*keys[place], place))
    mask = torch.zeros(len(keys), dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def on_ranks(work: Callable[[Ranks], dict[str, Cut]], world: int) -> Cuts:
    """Run `work` on as many threads, which add up counts as ranks do."""
    barrier, given_counts = threading.Barrier(world), [torch.zeros(0)] * world
    found: list[dict[str, Cut] | BaseException] = [{}] * world

    def run(rank: int) -> None:
        def total(counts: torch.Tensor) -> torch.Tensor:
            given_counts[rank] = counts
            barrier.wait(10)
            summed = torch.stack(given_counts).sum(0)
            barrier.wait(10)
            return summed

        try:
            found[rank] = work(Ranks(rank, world, total))
        except BaseException as error:
            found[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    results: Cuts = []
    for each in found:
        if isinstance(each, BaseException):
            raise each
        results.append(each)
    return results


def sharded(scores: torch.Tensor, cuts: Sequence[int], owners: Sequence[int]) -> dict[int, Shard]:
    """One piece of the scores for each rank: between two cuts, in the order of `owners`."""
    edges = [0, *sorted(cuts), len(scores)]
    return {owner: Shard(edges[n], scores[edges[n] : edges[n + 1]]) for n, owner in enumerate(owners)}


@settings(max_examples=150)
@given(data=st.data())
def test_equals_sorting_wherever_the_shards_are_cut(data: st.DataObject) -> None:
    world = data.draw(st.integers(1, 3))
    whole = {
        name: torch.tensor(data.draw(st.lists(SCORES, min_size=1, max_size=25)), dtype=torch.float32) for name in "abc"
    }
    counts = {name: data.draw(st.integers(0, len(scores))) for name, scores in whole.items()}
    ranks: list[dict[str, Shard]] = [{} for _ in range(world)]
    for name, scores in whole.items():
        cuts = data.draw(st.lists(st.integers(0, len(scores)), min_size=world - 1, max_size=world - 1))
        for owner, shard in sharded(scores, cuts, data.draw(st.permutations(range(world)))).items():
            if shard.data.numel() or data.draw(st.booleans()):
                ranks[owner][name] = shard
    found = on_ranks(lambda these: largest(ranks[these.rank], counts, these), world)
    assert all(each == found[0] for each in found), "the ranks disagree"
    for name, scores in whole.items():
        expected = sorted_mask(scores, counts[name])
        assert torch.equal(found[0][name].keep(Shard(0, scores)), expected)
        for rank in ranks:
            if name in rank:
                shard = rank[name]
                assert torch.equal(found[0][name].keep(shard), expected[shard.start : shard.stop])
        assert int(expected.sum()) == counts[name]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_numbers_and_chunks(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Rounded numbers are often equal; the elements are looked at seven at a time."""
    monkeypatch.setattr(module, "CHUNK", 7)
    scores = torch.randn(500, generator=torch.Generator().manual_seed(0)).to(dtype)
    for count in (0, 1, 250, 499, 500):
        [cut] = largest({"w": Shard(0, scores)}, {"w": count}, ALONE).values()
        assert torch.equal(cut.keep(Shard(0, scores)), sorted_mask(scores, count))


def test_only_ties_that_are_split_cost_more_messages() -> None:
    """Four sums of 256 counts per parameter, whatever their number; two small ones if equal elements are split."""
    for tied, expected in ((False, [512] * 4), (True, [512] * 4 + [4, 1])):
        sizes: list[int] = []
        shards = {"a": Shard(0, torch.arange(9.0)), "b": Shard(0, torch.ones(9) if tied else -torch.arange(9.0))}

        def total(counts: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(counts.numel())
            return counts

        largest(shards, {"a": 3, "b": 4}, Ranks(0, 2, total))
        assert sizes == expected


def test_a_parameter_without_scores_and_no_parameters_at_all() -> None:
    cuts = largest({"a": Shard(0, torch.tensor([1.0, 2.0]))}, {"a": 5, "idle": 3}, ALONE)
    assert cuts["a"].keep(Shard(0, torch.tensor([1.0, 2.0]))).all()
    assert largest({}, {}, ALONE) == {}
