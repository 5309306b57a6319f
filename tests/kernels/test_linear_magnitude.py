"""The fused linear layer against the layer and the magnitude of its output."""

import sys

import pytest
import torch

from cl_dist.kernels import reference
from cl_dist.kernels.linear_magnitude import linear_magnitude

MODULE = sys.modules["cl_dist.kernels.linear_magnitude"]


def layer(tokens: int, rows: int, inner: int, dtype: torch.dtype, device: torch.device) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    shapes = [(tokens, inner), (rows, inner), (rows,)]
    return tuple(torch.randint(-3, 4, shape).to(device, dtype) for shape in shapes)


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (70, 131, 37), (64, 128, 32)], ids=str)
def test_output_and_magnitude(
    device: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, per_token: bool
) -> None:
    x, weight, bias = layer(*shape, dtype, device)
    expected = torch.nn.functional.linear(x.double(), weight.double(), bias.double()).to(dtype)  # small integers: exact
    mask = torch.arange(shape[0], device=device) % 3 != 1
    bound = (MODULE.TILE_TOKENS + shape[1] + 4) * 2**-24  # as for row_magnitude
    for counted in (None, mask):
        output, magnitude = linear_magnitude(x, weight, bias, counted, per_token=per_token)
        assert torch.equal(output, expected)
        wanted = reference.row_magnitude(expected, counted, per_token=per_token)
        torch.testing.assert_close(magnitude, wanted, rtol=bound, atol=0)


def test_strides_a_batch_and_no_bias(device: torch.device) -> None:
    x, weight, _ = layer(12, 19, 21, torch.float32, device)
    output, magnitude = linear_magnitude(x.t().contiguous().t().view(12, 21), weight.t().contiguous().t())
    assert torch.equal(output, x @ weight.t())
    batched, same = linear_magnitude(x.view(3, 4, 21), weight)
    assert torch.equal(batched.view(12, 19), output)
    assert torch.equal(same, magnitude)


def test_a_token_that_is_left_out_may_hold_nan(device: torch.device) -> None:
    x, weight, bias = layer(5, 7, 3, torch.float32, device)
    x[2] = float("nan")
    mask = torch.tensor([True, True, False, True, True], device=device)
    for per_token in (True, False):
        assert linear_magnitude(x, weight, bias, mask, per_token=per_token)[1].isfinite().all()
        assert linear_magnitude(x, weight, bias, per_token=per_token)[1].isnan().all()


def test_no_tokens(device: torch.device) -> None:
    output, magnitude = linear_magnitude(torch.empty(0, 3, device=device), torch.ones(2, 3, device=device))
    assert output.shape == (0, 2)
    assert magnitude.tolist() == [0.0, 0.0]


def test_shapes_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer"):
        linear_magnitude(torch.ones(2, 3), torch.ones(4, 5))
