"""Row magnitudes against the formulas, token by token, and against the plain reference."""

import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cl_dist.kernels import MagnitudeTotal, reference, row_magnitude
from cl_dist.kernels.row_magnitude import fold_memory

MODULE = sys.modules["cl_dist.kernels.row_magnitude"]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda y: y,
    "transposed": lambda y: y.t().contiguous().t(),
    "every second row": lambda y: y.repeat_interleave(2, dim=1)[:, ::2],
    "part of wider rows": lambda y: torch.cat([y, y, y], dim=1)[:, y.shape[1] : 2 * y.shape[1]],
    "one token for all": lambda y: y[:1].expand(y.shape),
    "in a batch": lambda y: y.unsqueeze(0),
}
both = pytest.mark.parametrize("per_token", [True, False])


def check(output: torch.Tensor, mask: torch.Tensor | None = None, per_token: bool = True) -> None:
    """Compare with the reference's float64 sums. A token's sum in float32 rounds once per row and the sum over a block
    once per token, each time by at most half a unit; all terms are positive, so that the relative errors add up."""
    result = row_magnitude(output, mask, per_token=per_token)
    assert result.dtype == torch.float32
    bound = (MODULE.TOKEN_BLOCK + output.shape[-1] + 4) * 2**-24
    expected = reference.row_magnitude(output, mask, per_token=per_token)
    torch.testing.assert_close(result, expected, rtol=bound, atol=0, equal_nan=True)


def by_formula(output: torch.Tensor, tokens: list[tuple[int, int]], per_token: bool) -> torch.Tensor:
    total = torch.zeros(output.shape[-1], dtype=torch.float64)
    for b, t in tokens:
        y = output[b, t].double().abs()
        total += y / y.sum() if per_token and y.sum() > 0 else y if not per_token else 0
    return total


@both
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_reference_matches_the_formula_with_padding_left_out(dtype: torch.dtype, per_token: bool) -> None:
    torch.manual_seed(0)
    output = torch.randn(3, 5, 7).to(dtype)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], dtype=torch.bool)
    tokens = [(b, t) for b in range(3) for t in range(5) if mask[b, t]]
    expected = by_formula(output, tokens, per_token).float()
    result = reference.row_magnitude(output, mask, per_token=per_token)
    torch.testing.assert_close(result, expected, rtol=2**-23, atol=0)


@both
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_layout(device: torch.device, dtype: torch.dtype, layout: str, per_token: bool) -> None:
    torch.manual_seed(0)
    output = LAYOUTS[layout](torch.randn(35, 19).to(device, dtype))
    check(output, per_token=per_token)
    check(output, torch.rand(output.shape[:-1], device=device) < 0.6, per_token)


@pytest.mark.parametrize(
    "shape", [(1, 1), (1, 37), (65, 1), (64, 48), (3, 1023), (0, 5), (2, 0, 3), (7,)], ids=lambda shape: str(shape)
)
def test_odd_sizes(device: torch.device, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    output = torch.randn(shape, device=device)
    check(output)
    check(output, torch.rand(shape[:-1], device=device) < 0.5, per_token=False)


@settings(max_examples=30)
@given(tokens=st.integers(0, 100), rows=st.integers(1, 40), seed=st.integers(0, 99), per_token=st.booleans())
def test_any_size_on_the_cpu(tokens: int, rows: int, seed: int, per_token: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    check(torch.randn(tokens, rows, generator=generator), torch.rand(tokens, generator=generator) < 0.5, per_token)


@both
def test_rows_that_a_program_cannot_hold(
    triton_path: torch.device, monkeypatch: pytest.MonkeyPatch, per_token: bool
) -> None:
    monkeypatch.setattr(MODULE, "WIDEST_ROW", 16)
    monkeypatch.setattr(MODULE, "WIDE_PIECE", 16)
    monkeypatch.setattr(MODULE, "TILE", 64)
    output = torch.randn(37, 45, device=triton_path)
    check(output, per_token=per_token)
    check(output, torch.rand(37, device=triton_path) < 0.5, per_token)


def test_tokens_that_are_converted_in_parts() -> None:
    torch.manual_seed(2)
    check(torch.randn(MODULE.CONVERTED_TOKENS + 33, 3).half(), torch.rand(MODULE.CONVERTED_TOKENS + 33) < 0.5)


def test_a_mask_of_the_batch_counts_for_flattened_tokens_and_is_broadcast(device: torch.device) -> None:
    torch.manual_seed(3)
    output = torch.randn(2, 3, 5, device=device)
    mask = torch.tensor([[True, False, True], [False, False, True]], device=device)
    assert torch.equal(row_magnitude(output.reshape(6, 5), mask), row_magnitude(output, mask))
    assert torch.equal(row_magnitude(output, mask[0]), row_magnitude(output, mask[0].expand(2, 3)))


def test_all_tokens_count_without_a_mask(device: torch.device) -> None:
    output = torch.tensor([[[3.0, -1.0], [1.0, 0.0]]], device=device)
    assert row_magnitude(output).tolist() == [1.75, 0.25]
    assert row_magnitude(output, per_token=False).tolist() == [4.0, 1.0]


@pytest.mark.parametrize("small", [0.0, -0.0, 1e-39])
def test_a_token_that_is_as_good_as_zero_adds_zero(device: torch.device, small: float) -> None:
    output = torch.tensor([[small, 0.0], [1.0, 3.0]], device=device)
    assert row_magnitude(output).tolist() == [0.25, 0.75]
    assert reference.row_magnitude(output).tolist() == [0.25, 0.75]


def test_the_smallest_token_that_counts(device: torch.device) -> None:
    output = torch.tensor([[MODULE.SMALLEST_NORM, 0.0]], device=device)
    assert row_magnitude(output).tolist() == [1.0, 0.0]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@both
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_show_where_they_count_and_nowhere_else(device: torch.device, bad: float, per_token: bool) -> None:
    output = torch.tensor([[1.0, 3.0], [bad, 1.0]], device=device)
    check(output, per_token=per_token)
    assert not torch.isfinite(row_magnitude(output, per_token=per_token)[0])
    left_out = row_magnitude(output, torch.tensor([True, False], device=device), per_token=per_token)
    assert left_out.tolist() == ([0.25, 0.75] if per_token else [1.0, 3.0])


def test_detached_from_the_graph(device: torch.device) -> None:
    assert not row_magnitude(torch.randn(2, 3, device=device, requires_grad=True)).requires_grad


def test_float64_is_rounded_to_float32(device: torch.device) -> None:
    check(torch.randn(3, 5, dtype=torch.float64, device=device))


def test_positions_beyond_32_bits(device: torch.device) -> None:
    # Memory that is not touched costs nothing. The strides fit 32 bits, the positions do not.
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    by_token = far.as_strided((3, 5), (2**30, 1)).copy_(torch.arange(15).view(3, 5))
    check(by_token)
    assert row_magnitude(by_token, per_token=False).tolist() == [15.0, 18.0, 21.0, 24.0, 27.0]
    by_row = far.as_strided((5, 3), (1, 2**30))
    check(by_row)
    assert row_magnitude(by_row, per_token=False).tolist() == [10.0, 35.0, 60.0]


@both
def test_the_same_bits_every_time_and_with_any_number_of_threads(per_token: bool) -> None:
    torch.manual_seed(4)
    output = torch.randn(300, 1031)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 2, 1):
            torch.set_num_threads(threads)
            results.append(row_magnitude(output, per_token=per_token))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


OUTPUTS = [(0, 40, 12), (12, 70, 7), (19, 1, 300), (12, 33, 7), (0, 40, 12), (319, 64, 8)]
"""First row, tokens and rows of outputs; a layer may run twice."""


@both
@pytest.mark.parametrize("room", [0, 1 << 20])
def test_totals_of_many_outputs_are_their_magnitudes_one_after_the_other(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, per_token: bool, room: int
) -> None:
    monkeypatch.setattr(MODULE, "FOLD_BYTES", room)
    torch.manual_seed(6)
    total = torch.rand(327, dtype=torch.float64, device=device)
    expected = total.clone()
    magnitudes = MagnitudeTotal(total)
    for _ in range(2):  # the second time in memory of the right size
        for start, tokens, rows in OUTPUTS:
            output = torch.randn(tokens, rows, device=device).bfloat16()
            mask = torch.rand(tokens, device=device) < 0.7 if rows == 7 else None
            magnitudes.add(output, mask, start, per_token=per_token)
            expected[start : start + rows] += row_magnitude(output, mask, per_token=per_token)
        assert magnitudes.fold() is total
        assert torch.equal(total, expected)
    magnitudes.add(torch.ones(3, 12, device=device), None, 0)
    magnitudes.forget()
    if device.type == "cuda" or MODULE.path_of(total) == "triton":
        assert torch.equal(magnitudes.fold(), expected)


@pytest.mark.parametrize(("room", "micro_batches"), [(0, 1), (700, 1), (1 << 20, 1), (1 << 20, 3)])
def test_the_memory_for_block_sums_is_what_is_predicted(
    triton_path: torch.device, monkeypatch: pytest.MonkeyPatch, room: int, micro_batches: int
) -> None:
    monkeypatch.setattr(MODULE, "FOLD_BYTES", room)
    rows, tokens = [24, 7, 40, 8], 70
    magnitudes = MagnitudeTotal(torch.zeros(sum(rows), dtype=torch.float64))
    for _ in range(4):
        for _ in range(micro_batches):
            for place, number in enumerate(rows):
                magnitudes.add(torch.ones(tokens, number, device=triton_path), None, sum(rows[:place]))
        magnitudes.fold()
    assert 4 * magnitudes._partial.numel() == fold_memory(tokens, rows, micro_batches)
    assert fold_memory(tokens, rows, micro_batches) <= max(room, 4 * 3 * 40)
