"""Under every layout the ranks' pieces of masters, gradients and frozen weights are the whole tensors, once."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from cl_dist.sharding.layouts import Address, Shard

SIZES = {"body.0.weight": 35, "body.0.bias": 7, "body.2.weight": 21, "body.2.bias": 3}

Ranks = list[dict[str, Any]]


def covered(ranks: Ranks, spans: str, sizes: dict[str, int]) -> bool:
    """Whether each parameter's pieces follow each other from its first element to its last, or every rank has all."""
    if ranks[0]["layout"].startswith("stage 0"):
        return all(rank[spans] == {name: [0, size] for name, size in sizes.items()} for rank in ranks)
    for name, size in sizes.items():
        pieces = sorted(rank[spans][name] for rank in ranks if name in rank[spans])
        ends = [0, *(stop for _, stop in pieces)]
        if [start for start, _ in pieces] != ends[:-1] or ends[-1] != size:
            return False
    return True


def test_masters_cover_every_element_once(ranks: Ranks) -> None:
    assert ranks[0]["names"] == list(SIZES)
    assert covered(ranks, "spans", SIZES)


def test_gradients_are_those_of_the_whole_model(ranks: Ranks, bound: float) -> None:
    assert covered(ranks, "own spans", SIZES)
    for rank in ranks:
        assert rank["own spans"] == rank["spans"]
        assert rank["gradient error"] < bound
        assert rank["own error"] < bound


def test_frozen_shares_cover_every_element_once(ranks: Ranks) -> None:
    assert covered(ranks, "frozen spans", {"frozen.weight": 25})


def test_edited_masters_and_frozen_shares_arrive_in_the_model(ranks: Ranks) -> None:
    assert all(rank["published"] for rank in ranks)


def test_an_address_views_its_piece() -> None:
    flat = torch.arange(12.0).view(3, 4)
    shard = Address(flat, offset=5, start=100, numel=3).piece_of(flat)
    assert (shard.start, shard.stop) == (100, 103)
    shard.data.zero_()
    assert flat.flatten().nonzero().flatten().tolist() == [1, 2, 3, 4, 8, 9, 10, 11]


@pytest.mark.parametrize(("start", "numel"), [(0, 0), (7, 4)])
def test_a_shard_ends_behind_its_last_element(start: int, numel: int) -> None:
    assert Shard(start, torch.zeros(numel)).stop == start + numel
