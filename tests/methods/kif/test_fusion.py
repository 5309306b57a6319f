from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.fusion import UnitScores, accumulate, adaptive_share, hard_share, important, minmax

scores = st.lists(st.floats(0, 1e6), min_size=1, max_size=40).map(lambda values: torch.tensor(values).double())
PAIRS = st.integers(1, 40).flatmap(
    lambda n: st.tuples(*[st.lists(st.floats(0, 1e3), min_size=n, max_size=n).map(torch.DoubleTensor)] * 2)
)


@given(scores)
def test_minmax_fills_zero_to_one(values: torch.Tensor) -> None:
    scaled = minmax(values)
    if values.min() == values.max():
        assert (scaled == 0).all()
    else:
        assert (scaled.min(), scaled.max()) == (0.0, 1.0)
        assert torch.equal(scaled.argsort(stable=True), values.argsort(stable=True)) or scaled.unique().numel() < len(
            values
        )


@pytest.mark.parametrize("value", [0.0, 3.0, 1e-300])
def test_equal_scores_are_all_zero(value: float) -> None:
    assert minmax(torch.full((5,), value, dtype=torch.float64)).tolist() == [0.0] * 5


@given(PAIRS, st.floats(1e-4, 10))
def test_adaptive_shares_are_a_softmax(pair: tuple[torch.Tensor, torch.Tensor], tau: float) -> None:
    now, past = minmax(pair[0]), minmax(pair[1])
    share = adaptive_share(now, past, tau)
    truth = torch.softmax(torch.stack([now, past]) / tau, 0)[0]
    assert torch.allclose(share, truth, rtol=1e-10, atol=1e-300)
    assert ((share >= 0) & (share <= 1)).all()  # NaN would be neither


@given(scores, st.floats(0, 100))
def test_important_is_above_numpys_percentile(values: torch.Tensor, threshold: float) -> None:
    cut = np.percentile(values.numpy(), 100 - threshold)
    found = important(values, threshold)
    clear = (values - cut).abs() > 1e-9 * max(1.0, abs(cut))
    assert torch.equal(found[clear], (values > cut)[clear])


@pytest.mark.parametrize(("threshold", "count"), [(0.0, 0), (20.0, 2), (50.0, 5), (100.0, 9)])
def test_how_many_of_ten_are_important(threshold: float, count: int) -> None:
    assert int(important(torch.arange(10).double(), threshold).sum()) == count


@pytest.mark.parametrize("values", [[0.0] * 6, [2.5] * 6, [1.0]])
def test_of_equal_scores_none_is_important(values: list[float]) -> None:
    assert not important(torch.tensor(values).double(), 20.0).any()


def test_hard_fusion_has_four_cases() -> None:
    now = torch.tensor([9.0, 9.0, 0.0, 0.0, 0.0]).double()
    past = torch.tensor([9.0, 0.0, 9.0, 0.0, 0.0]).double()
    assert hard_share(now, past, 50.0, 0.3, 0.5).tolist() == [0.3, 1.0, 0.0, 0.5, 0.5]


def test_accumulation_weighs_the_past() -> None:
    now, past = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 1.0])
    assert accumulate(now, past, 0.3).tolist() == pytest.approx([0.65, 0.7])


@pytest.mark.parametrize("fusion", ["adaptive", "hard"])
def test_a_stream_of_equal_scores_stays_defined(fusion: str) -> None:
    """No NaN for untouched units, a single unit, or a task in which no unit is more important than another."""
    for count in (1, 4):
        held = UnitScores(count, KifConfig(name="kif", fusion=fusion))  # type: ignore[arg-type]
        for index in range(3):
            held.take(torch.zeros(count, dtype=torch.float64), first=index == 0)
            assert held.share_new.tolist() == [1.0 if index == 0 else 0.5] * count
            assert not any(tensor.isnan().any() for tensor in held.tensors().values())


def test_the_first_task_is_the_past_of_the_second() -> None:
    held = UnitScores(3, KifConfig(name="kif"))
    held.take(torch.tensor([2.0, 6.0, 4.0]).double(), first=True)
    assert held.accumulated.tolist() == [2.0, 6.0, 4.0]
    assert held.accumulated_normalised.tolist() == [0.0, 1.0, 0.5]
    held.take(torch.tensor([3.0, 3.0, 5.0]).double(), first=False)
    shares = [1 / (1 + math.exp((past - now) / 0.25)) for now, past in [(0, 0), (0, 1), (1, 0.5)]]
    assert held.share_new.tolist() == pytest.approx(shares)
    assert held.accumulated.tolist() == pytest.approx([0.0, 0.7, 0.3 + 0.35])
    assert held.accumulated_normalised.tolist() == pytest.approx([0.0, 1.0, 0.65 / 0.7])
