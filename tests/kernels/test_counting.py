"""How many launches the operations take, and when the host waits; see `counting.py`."""

from __future__ import annotations

import pytest
import torch

from cl_dist.kernels import MagnitudeTotal, flat_row_masks, masked_weight_grad, topk_row_masks, weight_grad_ways
from tests.kernels.counting import Counting, OnDevice

SIZES = [24, 8, 40, 8]


def test_the_device_computes_and_counts() -> None:
    with Counting() as seen:
        x = OnDevice(torch.arange(6.0))
        total = (x.view(2, 3) + 1).sum()
        assert total.item() == 21
        assert x[x > 3].tolist() == [4, 5]
        x.to("meta", non_blocking=True)
        torch.ones(2).to("meta", non_blocking=True)
        torch.ones(2).to("meta")
    assert seen.launches[:2] == ["add", "sum"]
    assert seen.waits[0] == "_local_scalar_dense"
    assert seen.waits[-1] == "_to_copy"


def test_magnitudes_take_a_launch_for_each_output_and_one_for_all(triton_path: torch.device) -> None:
    with Counting() as seen:
        total = MagnitudeTotal(OnDevice(torch.zeros(80, dtype=torch.float64)))
        for _ in range(4):  # in the first steps the memory grows
            seen.launches.clear()
            for start, rows in zip([0, 24, 32, 72], SIZES, strict=True):
                total.add(OnDevice(torch.randn(5, rows)), OnDevice(torch.rand(5) < 0.5), start)
            total.fold()
    assert seen.launches == ["_sum_whole_rows"] * 4 + ["_fold_all"]
    assert seen.waits == []


def test_rows_are_chosen_in_one_launch_and_the_host_waits_for_their_numbers_alone(triton_path: torch.device) -> None:
    with Counting() as seen:
        magnitudes = OnDevice(torch.rand(80))
        flat_row_masks(magnitudes, SIZES, 0.7)
        assert (seen.launches, seen.waits) == (["_choose_rows"], [])
        topk_row_masks(magnitudes, SIZES, 0.7)
    assert len(seen.launches) == 2
    assert len(seen.waits) == 1


@pytest.mark.parametrize(
    ("way", "launches"),
    [
        ("gathered", ["new_zeros", "_tile_kernel"]),
        ("tiles", ["new_zeros", "_copy_kernel", "_tile_kernel"]),
        ("vendor", ["_copy_kernel", "mm", "_spread_kernel"]),
        ("persistent", ["_copy_kernel", "_persistent_kernel"]),
    ],
)
def test_a_weight_gradient_never_waits(triton_path: torch.device, way: str, launches: list[str]) -> None:
    x, dy, rows = torch.randn(5, 16).bfloat16(), torch.randn(5, 9).bfloat16(), torch.tensor([1, 4, 7])
    with Counting() as seen:
        inputs = [OnDevice(tensor) for tensor in (x, dy, rows)]
        result = weight_grad_ways(inputs[0])[way](*inputs)
    assert torch.equal(result.inner, weight_grad_ways(x)[way](x, dy, rows))
    assert (seen.launches, seen.waits) == (launches, [])


def test_nor_does_the_operation_itself(triton_path: torch.device) -> None:
    with Counting() as seen:
        x, dy = OnDevice(torch.randn(5, 16)), OnDevice(torch.randn(5, 9))
        masked_weight_grad(x, dy, OnDevice(torch.tensor([1, 4])), bias=True)
    assert seen.waits == []
