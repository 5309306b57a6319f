"""The quantile of elements that lie on several ranks: the same number as sorting all of them."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.methods.recurrent_kif.elements import select

SCORES = st.one_of(st.just(0.0), st.floats(0.0, 1.0), st.floats(0.0, 1e-300), st.floats(0.0, allow_infinity=False))


@given(scores=st.lists(SCORES, min_size=1, max_size=60), data=st.data())
def test_selects_what_sorting_finds(scores: list[float], data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, len(scores) - 1))
    size = data.draw(st.integers(1, len(scores)))
    keys = torch.tensor(scores, dtype=torch.float64).view(torch.int64)
    found = select(lambda: iter(keys.split(size)), rank, lambda counts: counts)
    assert float(torch.tensor([found]).view(torch.float64)) == sorted(scores)[rank]


def test_every_digit_asks_for_all_keys_and_adds_up_over_the_ranks() -> None:
    ranks = [torch.tensor([1.0, 4.0], dtype=torch.float64), torch.tensor([3.0, 2.0, 0.0], dtype=torch.float64)]
    asked = []

    def keys() -> Iterator[torch.Tensor]:
        asked.append(len(asked))
        yield from (scores.view(torch.int64) for scores in ranks)

    found = [select(keys, rank, lambda counts: counts) for rank in range(5)]
    assert torch.tensor(found).view(torch.float64).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert len(asked) == 4 * 5
