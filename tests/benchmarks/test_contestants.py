"""The implementations that the kernels are compared with give the same results."""

from __future__ import annotations

import pytest
import torch

from cl_dist.benchmarks import importance, magnitude, topk, weight_grad
from cl_dist.kernels import kept_rows, reference

generator = torch.Generator().manual_seed(0)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


def test_magnitude() -> None:
    y = random(9, 7)
    torch.testing.assert_close(magnitude.shortest_chain(y), reference.row_magnitude(y))


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.7])
def test_topk(threshold: float) -> None:
    sizes = [5, 8, 1]
    flat = random(sum(sizes)).abs().double()
    expected = [mask.rows for mask in reference.topk_row_masks(flat, sizes, threshold)]
    for chosen in (topk.quantiles, topk.selections):
        rows = [found.flatten() for found in chosen(flat, sizes, threshold)]
        assert all(map(torch.equal, rows, expected))


def test_weight_gradient() -> None:
    x, dy = random(11, 5), random(11, 10)
    rows = torch.tensor([1, 4, 5])
    assert rows.numel() == kept_rows(10, 0.7)
    torch.testing.assert_close(weight_grad.gathered(x, dy, rows), reference.masked_weight_grad(x, dy, rows)[0])


@pytest.mark.parametrize("order", ["first", "second", "mixed"])
def test_importance(order: str) -> None:
    operands = importance.Operands(random(33), random(33), random(33).abs(), random(33).abs())
    other = importance.Operands(*(tensor.clone() for tensor in operands))
    importance.in_place_chain(operands, torch.empty(33), order)
    reference.importance_update_(*other, beta1=importance.BETA, beta2=importance.BETA, order=order)
    for ours, theirs in zip(operands, other, strict=True):
        torch.testing.assert_close(ours, theirs)
    operands.fresh_states()
    assert not operands.smoothed.any()
    assert not operands.uncertainty.any()
