"""Samples in arrays are the samples that went in, whatever their labels look like, and selections copy no tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.tasks.samples import Samples, as_samples, join, pack, whole
from cl_dist.tasks.types import IGNORE, Encoded

ids = st.lists(st.integers(0, 40) | st.integers(65_000, 66_000), max_size=7)


@st.composite
def stretches(draw: st.DrawFn, index: int) -> Encoded:
    """A sample whose labels are a stretch of its ids, as for decoders and masked language models."""
    tokens = draw(ids)
    start, end = sorted(draw(st.tuples(*[st.integers(0, len(tokens))] * 2)))
    return Encoded(index, tokens, [IGNORE] * start + tokens[start:end] + [IGNORE] * (len(tokens) - end))


@st.composite
def any_labels(draw: st.DrawFn, index: int) -> Encoded:
    """A sample with labels of any kind and number."""
    return Encoded(index, draw(ids), draw(st.lists(st.just(IGNORE) | st.integers(0, 70_000), max_size=7)))


def lists(make: Callable[[int], st.SearchStrategy[Encoded]]) -> st.SearchStrategy[list[Encoded]]:
    """Up to six samples."""
    return st.integers(0, 6).flatmap(lambda count: st.tuples(*map(make, range(count))).map(list))


mixed = lists(lambda index: stretches(index) | any_labels(index))


@given(st.one_of(lists(stretches), lists(any_labels), mixed))
def test_what_is_packed_comes_back(samples: list[Encoded]) -> None:
    packed = as_samples(samples)
    assert list(packed) == samples
    assert packed == samples
    assert packed.lengths.tolist() == [len(sample.input_ids) for sample in samples]
    assert packed.label_lengths.tolist() == [len(sample.labels) for sample in samples]
    assert packed.targets.tolist() == [sample.targets for sample in samples]


@given(mixed, mixed, st.randoms(use_true_random=False))
def test_selections_are_those_of_lists(first: list[Encoded], second: list[Encoded], draw: object) -> None:
    joined, expected = join([as_samples(first), second, []]), [*first, *second]
    assert list(joined) == expected
    places = list(range(len(expected)))[::-2]
    assert joined.pick(places) == [expected[place] for place in places]
    assert joined.pick(places).targets.tolist() == [expected[place].targets for place in places]
    assert joined[1:4] == expected[1:4]
    assert joined[::-1][:2] == expected[::-1][:2]
    assert join([joined.pick(places), joined]).lengths.tolist() == [
        len(sample.input_ids) for sample in [*(expected[place] for place in places), *expected]
    ]


def test_selections_with_other_samples_or_another_order_differ() -> None:
    samples = [Encoded(0, [1, 2], [IGNORE, 2]), Encoded(1, [3], [3])]
    packed = as_samples(samples)
    assert packed != samples[::-1]
    assert packed != samples[:1]
    assert packed != [samples[0], Encoded(1, [3], [IGNORE])]


@pytest.mark.parametrize(("largest", "each"), [(65_535, 2), (65_536, 4)])
def test_a_token_takes_as_few_bytes_as_its_id_allows(largest: int, each: int) -> None:
    tokens = [largest] * 10_000
    table = pack([Encoded(0, tokens, [IGNORE] * 9_000 + tokens[9_000:])])
    assert 10_000 * each <= table.nbytes < 10_000 * each + 100
    assert table.sample(0).input_ids == tokens


def test_an_iterators_samples_are_not_held_together() -> None:
    living: set[int] = set()

    class Noted(list[int]):
        def __del__(self) -> None:
            living.discard(id(self))

    def samples() -> object:
        for index in range(50):
            tokens = Noted([index] * 5)
            living.add(id(tokens))
            yield Encoded(index, tokens, [])
            del tokens
            assert len(living) <= 3

    packed = whole(pack(samples()))  # type: ignore[arg-type]  # yields Encoded
    assert packed[49].input_ids == [49] * 5


def test_a_selection_takes_twelve_bytes_a_sample() -> None:
    packed = as_samples([Encoded(index, [1] * 100, []) for index in range(100)])
    twice = join([packed, packed])
    assert isinstance(twice, Samples)
    assert twice._which.nbytes + twice._rows.nbytes == 12 * 200
    assert twice._tables[0] is packed._tables[0]
    assert np.shares_memory(twice._tables[1].ids, packed._tables[0].ids)
