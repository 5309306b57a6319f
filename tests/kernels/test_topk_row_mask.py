"""The rows kept, against `torch.quantile` and the closed count."""

import math

import pytest
import torch
from cl_dist.kernels import kept_rows, topk_row_mask
from hypothesis import given
from hypothesis import strategies as st

thresholds = st.floats(0, 0.999, allow_nan=False)


@given(rows=st.integers(1, 200), threshold=thresholds, seed=st.integers(0, 1000))
def test_without_ties_exactly_the_largest_k_rows(rows: int, threshold: float, seed: int) -> None:
    magnitude = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).double()
    keep = topk_row_mask(magnitude, threshold)
    k = rows - math.ceil(threshold * (rows - 1))
    assert int(keep.sum()) == k == kept_rows(rows, threshold)
    assert set(magnitude[keep].tolist()) == set(range(rows - k, rows))


@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("rows", [1, 2, 7, 48, 101])
def test_equals_the_interpolated_quantile(rows: int, threshold: float) -> None:
    torch.manual_seed(rows)
    magnitude = torch.rand(rows, dtype=torch.float64)
    assert torch.equal(topk_row_mask(magnitude, threshold), magnitude >= torch.quantile(magnitude, threshold))


def test_ties_at_the_threshold_are_all_kept() -> None:
    magnitude = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0])
    assert topk_row_mask(magnitude, 0.7).tolist() == [False, True, True, True, True]


def test_a_fresh_lora_b_keeps_every_row() -> None:
    assert topk_row_mask(torch.zeros(11), 0.7).all()
