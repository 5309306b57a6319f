"""Row magnitudes against the formulas, token by token."""

import pytest
import torch
from cl_dist.kernels import row_magnitude


def by_formula(output: torch.Tensor, tokens: list[tuple[int, int]], per_token: bool) -> torch.Tensor:
    total = torch.zeros(output.shape[-1], dtype=torch.float64)
    for b, t in tokens:
        y = output[b, t].double().abs()
        total += y / y.sum() if per_token and y.sum() > 0 else y if not per_token else 0
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("per_token", [True, False])
def test_matches_the_formula_with_padding_left_out(dtype: torch.dtype, per_token: bool) -> None:
    torch.manual_seed(0)
    output = torch.randn(3, 5, 7).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    tokens = [(b, t) for b in range(3) for t in range(5) if mask[b, t]]
    expected = by_formula(output, tokens, per_token)
    torch.testing.assert_close(row_magnitude(output, mask, per_token=per_token), expected, rtol=1e-12, atol=0)


def test_all_tokens_count_without_a_mask() -> None:
    output = torch.tensor([[[3.0, -1.0], [1.0, 0.0]]])
    assert row_magnitude(output).tolist() == [1.75, 0.25]
    assert row_magnitude(output, per_token=False).tolist() == [4.0, 1.0]


def test_a_zero_output_adds_zero() -> None:
    output = torch.tensor([[0.0, 0.0], [1.0, 3.0]])
    assert row_magnitude(output).tolist() == [0.25, 0.75]


def test_detached_from_the_graph_and_in_double_precision() -> None:
    output = torch.randn(2, 3, requires_grad=True)
    result = row_magnitude(output)
    assert not result.requires_grad
    assert result.dtype == torch.float64
