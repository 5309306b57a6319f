"""The rows kept, against `torch.quantile`, the closed count, and the reference that sorts."""

import math
import sys

import pytest
import torch
from cl_dist.kernels import RowMask, kept_rows, reference, topk_row_masks
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MODULE = sys.modules["cl_dist.kernels.topk_row_mask"]
INF, NAN = float("inf"), float("nan")
thresholds = st.floats(0, 1, allow_nan=False)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
# The fixture chooses the path and has nothing to reset between examples.
one_fixture = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])


def of_one_layer(magnitude: torch.Tensor, threshold: float) -> RowMask:
    (mask,) = topk_row_masks(magnitude, [magnitude.numel()], threshold)
    return mask


def check(magnitudes: torch.Tensor, sizes: list[int], threshold: float) -> list[RowMask]:
    masks = topk_row_masks(magnitudes, sizes, threshold)
    for mask, expected in zip(masks, reference.topk_row_masks(magnitudes, sizes, threshold), strict=True):
        assert mask.keep.dtype == torch.bool
        assert mask.rows.dtype == torch.int64
        assert torch.equal(mask.keep, expected.keep)
        assert torch.equal(mask.rows, expected.rows)
    return masks


@given(rows=st.integers(1, 200), threshold=thresholds, seed=st.integers(0, 1000))
def test_without_ties_exactly_the_largest_k_rows(rows: int, threshold: float, seed: int) -> None:
    magnitude = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).double()
    mask = of_one_layer(magnitude, threshold)
    k = rows - math.ceil(threshold * (rows - 1))
    assert len(mask.rows) == int(mask.keep.sum()) == k == kept_rows(rows, threshold)
    assert set(magnitude[mask.rows].tolist()) == set(range(rows - k, rows))


@dtypes
@pytest.mark.parametrize("threshold", [0.0, 0.25, 0.5, 0.7, 0.9, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 7, 48, 101])
def test_equals_the_interpolated_quantile(rows: int, threshold: float, dtype: torch.dtype) -> None:
    torch.manual_seed(rows)
    magnitude = torch.rand(rows, dtype=torch.float64)
    # The quantile of float32 numbers is interpolated in float32, which may round up to a row that is below it.
    expected = magnitude >= torch.quantile(magnitude, threshold)
    assert torch.equal(of_one_layer(magnitude, threshold).keep, expected)
    assert torch.equal(of_one_layer((magnitude * 1000).floor().to(dtype), 0.0).keep, torch.ones(rows, dtype=torch.bool))


@one_fixture
@given(
    values=st.lists(
        st.lists(
            st.sampled_from([0.0, -0.0, 1.0, 1e-45, -1e-45, -1.0, 2.5, INF, -INF, NAN, 3e38]), min_size=1, max_size=9
        ),
        min_size=1,
        max_size=3,
    ),
    threshold=st.sampled_from([0.0, 0.3, 0.7, 0.99, 1.0]),
    double=st.booleans(),
)
def test_ties_zeros_infinities_and_nan_as_in_a_sort(
    device: torch.device, values: list[list[float]], threshold: float, double: bool
) -> None:
    flat = torch.tensor(
        [value for layer in values for value in layer], dtype=torch.float64 if double else torch.float32, device=device
    )
    sizes = [len(layer) for layer in values]
    for size, mask in zip(sizes, check(flat, sizes, threshold), strict=True):
        assert len(mask.rows) >= kept_rows(size, threshold)


@dtypes
def test_layers_of_any_length_in_one_call(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MODULE, "BLOCK", 64)
    torch.manual_seed(5)
    sizes = [1, 63, 64, 65, 300, 2]
    magnitudes = torch.rand(sum(sizes), dtype=dtype, device=device).exp()
    for threshold in (0.0, 0.7, 1.0):
        check(magnitudes, sizes, threshold)
    close = 1 + torch.rand(sum(sizes), dtype=dtype, device=device) * 100 * torch.finfo(dtype).eps
    check(close, sizes, 0.5)


@dtypes
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_both_signs_of_nan_are_the_largest(device: torch.device, dtype: torch.dtype, sign: float) -> None:
    magnitude = torch.tensor([2.0, NAN, 1.0], dtype=dtype).copysign(torch.tensor([1.0, sign, 1.0], dtype=dtype))
    assert magnitude[1].signbit() == (sign < 0)
    assert of_one_layer(magnitude.to(device), 1.0).rows.tolist() == [1]
    assert of_one_layer(magnitude.to(device), 0.5).rows.tolist() == [0, 1]


def test_ties_at_the_threshold_are_all_kept(device: torch.device) -> None:
    magnitude = torch.tensor([1.0, 2.0, 2.0, 2.0, 3.0], device=device)
    mask = of_one_layer(magnitude, 0.7)
    assert mask.keep.tolist() == [False, True, True, True, True]
    assert mask.rows.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("value", [0.0, 1.5, NAN])
def test_a_fresh_lora_b_keeps_every_row(device: torch.device, value: float) -> None:
    assert of_one_layer(torch.full((11,), value, device=device), 0.7).keep.all()


def test_minus_zero_equals_zero(device: torch.device) -> None:
    assert of_one_layer(torch.tensor([-0.0, 0.0, -0.0], device=device), 1.0).keep.all()


def test_strided_magnitudes(device: torch.device) -> None:
    torch.manual_seed(6)
    check(torch.rand(2, 21, device=device).t()[:, 0], [20, 1], 0.7)


def test_no_layers(device: torch.device) -> None:
    assert topk_row_masks(torch.empty(0, device=device), [], 0.7) == []


@pytest.mark.parametrize(("sizes", "threshold"), [([3], 0.7), ([2, 0], 0.7), ([2], -0.1), ([2], 1.1), ([2], NAN)])
def test_what_does_not_go_together_is_refused(sizes: list[int], threshold: float) -> None:
    with pytest.raises(ValueError, match=r"threshold|make up"):
        topk_row_masks(torch.zeros(2), sizes, threshold)


def test_other_numbers_are_refused() -> None:
    with pytest.raises(TypeError, match="bfloat16"):
        of_one_layer(torch.zeros(2, dtype=torch.bfloat16), 0.7)


def test_all_layers_of_a_large_model_at_once() -> None:
    torch.manual_seed(7)
    sizes = [1024, 4096, 11008] * 70
    magnitudes = torch.rand(sum(sizes), dtype=torch.float64)
    masks = topk_row_masks(magnitudes, sizes, 0.7)
    assert [len(mask.rows) for mask in masks] == [kept_rows(size, 0.7) for size in sizes]
    expected = reference.topk_row_masks(magnitudes, sizes, 0.7)
    assert all(torch.equal(mask.keep, other.keep) for mask, other in zip(masks, expected, strict=True))
