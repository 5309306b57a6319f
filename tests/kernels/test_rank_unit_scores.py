"""Scores of LoRA's ranks, against the mean of the outer products."""

import pytest
import torch

from cl_dist.kernels import rank_unit_scores, reference

NAN, INF = float("nan"), float("inf")
States = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


def states(r: int, in_features: int, out_features: int, dtype: torch.dtype = torch.float32) -> States:
    torch.manual_seed(r)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = ((r, in_features), (r, in_features), (out_features, r), (out_features, r))
    return tuple(torch.rand(shape).to(device, dtype) for shape in shapes)


@pytest.mark.parametrize(("r", "in_features", "out_features"), [(1, 1, 1), (8, 48, 33), (3, 1, 70), (16, 500, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_mean_of_the_outer_products(r: int, in_features: int, out_features: int, dtype: torch.dtype) -> None:
    tensors = states(r, in_features, out_features, dtype)
    scores = rank_unit_scores(*tensors)
    assert scores.shape == (r,)
    assert scores.dtype == torch.float32
    expected = reference.rank_unit_scores(*(tensor.double() for tensor in tensors))
    # The two products of smoothed and uncertainty and the result are rounded to float32, all terms are positive.
    torch.testing.assert_close(scores.double(), expected, rtol=3 * 2**-24, atol=0)


def test_double_precision_stays() -> None:
    tensors = states(4, 30, 20, torch.float64)
    scores = rank_unit_scores(*tensors)
    assert scores.dtype == torch.float64
    torch.testing.assert_close(scores, reference.rank_unit_scores(*tensors), rtol=1e-13, atol=0)


def test_shards_with_strides() -> None:
    a, ua, b, ub = states(5, 40, 30)
    expected = rank_unit_scores(a, ua, b, ub)
    assert torch.equal(rank_unit_scores(a.t().contiguous().t(), ua, b.t().contiguous().t(), ub), expected)


@pytest.mark.parametrize("value", [NAN, INF])
def test_nan_and_inf_stay_in_their_rank(value: float) -> None:
    tensors = states(4, 6, 5)
    tensors[0][2, 3] = value
    tensors[3][1, 0] = value
    assert rank_unit_scores(*tensors).isfinite().tolist() == [False, True, False, True]


def test_no_ranks() -> None:
    assert rank_unit_scores(*states(0, 6, 5)).shape == (0,)


def test_no_outer_product_is_built() -> None:
    tensors = states(2, 200_000, 200_000)  # an outer product of a rank would take 160 GB
    assert rank_unit_scores(*tensors).isfinite().all()


@pytest.mark.parametrize("which", range(4))
def test_shapes_that_do_not_go_together_are_refused(which: int) -> None:
    tensors = list(states(4, 6, 5))
    tensors[which] = tensors[which][:-1, :-1]
    with pytest.raises(ValueError, match=r"must be \(r, in_features\)"):
        rank_unit_scores(*tensors)
