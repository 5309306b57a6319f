"""Every kernel against float64 on the device itself, with odd sizes, and the same bits in repeated calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cl_dist import kernels
from cl_dist.benchmarks.gpu.measuring import Record
from cl_dist.kernels import reference

DTYPES = (torch.bfloat16, torch.float32, torch.float16)
ALLOWED = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 1e-5}
"""Largest relative error (Frobenius norm) of a product in this dtype: the rounding of its elements, or, in float32,
that of its sums."""
REPEATS = 3
THRESHOLD = 0.7


def measure(record: Record, device: torch.device) -> None:
    """Check the kernels in the order in which a step uses them."""
    for dtype in DTYPES:
        _magnitudes(record, device, dtype)
        _weight_grads(record, device, dtype)
        _column_grads(record, device, dtype)
    for dtype in (torch.float64, torch.float32):
        record.measure(f"topk_row_masks {_name(dtype)}", partial(_topk, record, device, dtype))
    for start in (0, 1, 4097):
        for dtype in DTYPES[:2]:
            name = f"apply_row_mask_ from {start} {_name(dtype)}"
            record.measure(name, partial(_row_mask, record, device, dtype, start))
    for order in ("mixed", "first", "second"):
        for count in record.size((1 << 24, (1 << 20) + 5), (1 << 12, 77)):
            record.measure(f"importance_update_ {order} {count}", partial(_importance, device, order, count))


def _magnitudes(record: Record, device: torch.device, dtype: torch.dtype) -> None:
    for tokens, rows in record.size(((8192, 4096), (4000, 11008), (777, 8), (300, 28672)), ((40, 48), (7, 8))):
        for per_token in (True, False):
            name = f"row_magnitude {tokens}x{rows} {_name(dtype)} {'per token' if per_token else 'batch'}"
            record.measure(name, partial(_magnitude, device, dtype, tokens, rows, per_token))


def _magnitude(device: torch.device, dtype: torch.dtype, tokens: int, rows: int, per_token: bool) -> dict[str, Any]:
    y, counted = _random(device, dtype, tokens, rows), torch.rand(tokens, device=device) < 0.9
    wanted = reference.row_magnitude(y, counted, per_token=per_token)  # in float64, rounded at the end
    return compared(lambda: [kernels.row_magnitude(y, counted, per_token=per_token)], [wanted])


def _weight_grads(record: Record, device: torch.device, dtype: torch.dtype) -> None:
    on_gpu = ((4096, 4096, 4096), (4001, 11008, 4096), (513, 4096, 8), (4096, 8, 4096), (333, 512, 512))
    for tokens, rows, inputs in record.size(on_gpu, ((40, 48, 32), (9, 8, 16))):
        for added in (False, True):
            name = f"masked_weight_grad {tokens}x{rows}x{inputs} {_name(dtype)}{' added' if added else ''}"
            record.measure(name, partial(_weight_grad, device, dtype, (tokens, rows, inputs), added))
        record.measure(
            f"weight_grad_ways {tokens}x{rows}x{inputs} {_name(dtype)}",
            partial(_ways, device, dtype, (tokens, rows, inputs)),
        )


def _weight_grad(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int], added: bool) -> dict[str, Any]:
    tokens, rows, inputs = size
    x, dy = _random(device, dtype, tokens, inputs), _random(device, dtype, tokens, rows)
    kept = torch.randperm(rows, device=device)[: kernels.kept_rows(rows, THRESHOLD)].sort().values
    old = [_random(device, torch.float32, rows, inputs), _random(device, torch.float32, rows)] if added else []
    wide = [tensor.double() for tensor in old]
    wanted = reference.masked_weight_grad(x.double(), dy.double(), kept, *wide, bias=True)

    def call() -> Sequence[torch.Tensor]:
        weight, bias = kernels.masked_weight_grad(x, dy, kept, *(tensor.clone() for tensor in old), bias=True)
        assert bias is not None
        return weight, bias

    assert wanted[1] is not None
    dropped = torch.ones(rows, dtype=torch.bool, device=device)
    dropped[kept] = False
    before = old[0][dropped] if added else torch.zeros_like(wanted[0][dropped])
    untouched = torch.equal(call()[0][dropped].double(), before.double())
    # A product in the input's dtype is as exact as that dtype, whatever it is then added to.
    found = compared(call, [wanted[0], wanted[1]], allowed=ALLOWED[dtype])
    return {**found, "dropped_rows_untouched": untouched, "ok": found["ok"] and untouched}


def _ways(device: torch.device, dtype: torch.dtype, size: tuple[int, int, int]) -> dict[str, Any]:
    """Each of the ways among which the kernel chooses; `ok` and `same_bits` are those of all of them."""
    tokens, rows, inputs = size
    x, dy = _random(device, dtype, tokens, inputs), _random(device, dtype, tokens, rows)
    kept = torch.randperm(rows, device=device)[: kernels.kept_rows(rows, THRESHOLD)].sort().values
    wanted = reference.masked_weight_grad(x.double(), dy.double(), kept)[0]
    each = {
        name: compared(lambda way=way: [way(x, dy, kept)], [wanted], ALLOWED[dtype])  # type: ignore[misc]
        for name, way in kernels.weight_grad_ways(x).items()
    }
    return {
        "ways": each,
        "error": max((found["error"] for found in each.values()), default=0.0),
        "same_bits": all(found["same_bits"] for found in each.values()),
        "ok": all(found["ok"] for found in each.values()),
    }


def _column_grads(record: Record, device: torch.device, dtype: torch.dtype) -> None:
    on_gpu = ((4096, 4096, 4096), (4001, 4096, 11008), (513, 4096, 8), (4096, 8, 4096), (333, 512, 512))
    for tokens, rows, inputs in record.size(on_gpu, ((40, 48, 32), (9, 8, 16))):
        for transposed in (False, True):
            name = f"column_weight_grad {tokens}x{rows}x{inputs} {_name(dtype)}{' transposed' if transposed else ''}"
            record.measure(name, partial(_column_grad, device, dtype, (tokens, rows, inputs), transposed))


def _column_grad(
    device: torch.device, dtype: torch.dtype, size: tuple[int, int, int], transposed: bool
) -> dict[str, Any]:
    """The operation, and each of the ways among which it chooses."""
    tokens, rows, inputs = size
    x, dy = _random(device, dtype, tokens, inputs), _random(device, dtype, tokens, rows)
    columns = torch.randperm(inputs, device=device)[: kernels.kept_rows(inputs, THRESHOLD)].sort().values
    wanted = reference.column_weight_grad(x.double(), dy.double(), columns, transposed=transposed)
    ways = kernels.column_weight_grad_ways(x).values()

    def call() -> Sequence[torch.Tensor]:
        found = kernels.column_weight_grad(x, dy, columns, transposed=transposed)
        return [found, *(way(x, dy, columns, transposed) for way in ways)]

    return compared(call, [wanted] * (1 + len(ways)), ALLOWED[dtype])


def _topk(record: Record, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    sizes = record.size(([4096] * 4 + [11008] * 2 + [4096]) * 32, [40, 8, 1])
    flat = torch.rand(sum(sizes), device=device, dtype=dtype)
    flat[: sizes[0] // 2] = 0.5  # ties
    flat[-1] = float("nan")
    wanted = reference.topk_row_masks(flat, sizes, THRESHOLD)
    calls = [kernels.topk_row_masks(flat, sizes, THRESHOLD) for _ in range(REPEATS)]
    same = [
        all(torch.equal(a.keep, b.keep) and torch.equal(a.rows, b.rows) for a, b in zip(call, wanted, strict=True))
        for call in calls
    ]
    return {"equal": all(same), "same_bits": len(set(same)) == 1, "ok": all(same)}


def _row_mask(record: Record, device: torch.device, dtype: torch.dtype, start: int) -> dict[str, Any]:
    length, elements = record.size((4096, (8 << 20) + 3), (7, 5000))
    shard = _random(device, dtype, elements)
    keep = torch.rand((start + shard.numel()) // length + 1, device=device) < 1 - THRESHOLD
    wanted = reference.apply_row_mask_(shard.clone(), start, length, keep)
    calls = [kernels.apply_row_mask_(shard.clone(), start, length, keep) for _ in range(REPEATS)]
    same = [torch.equal(call, wanted) for call in calls]
    return {"equal": all(same), "same_bits": len(set(same)) == 1, "ok": all(same)}


def _importance(device: torch.device, order: str, count: int) -> dict[str, Any]:
    given = [_random(device, torch.float32, count) for _ in range(2)]
    states = [_random(device, torch.float32, count).abs() for _ in range(2)]
    wide = [tensor.double() for tensor in (*given, *states)]
    reference.importance_update_(*wide, order=order)

    def call() -> Sequence[torch.Tensor]:
        new = [state.clone() for state in states]
        kernels.importance_update_(*given, *new, order=order)
        return new

    return compared(call, wide[2:])


def compared(
    call: Callable[[], Sequence[torch.Tensor]], wanted: Sequence[torch.Tensor], allowed: float = 1e-5
) -> dict[str, Any]:
    """Relative error of what `call` returns, whether it is finite, and whether repeated calls return the same bits."""
    first = [tensor.clone() for tensor in call()]
    pairs = list(zip(first, wanted, strict=True))
    errors = [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-300)) for a, b in pairs]
    finite = all(bool(tensor.isfinite().all()) for tensor in first)
    again = [call() for _ in range(REPEATS - 1)]
    same = all(torch.equal(a, b) for other in again for a, b in zip(first, other, strict=True))
    return {
        "error": max(errors),
        "allowed": allowed,
        "finite": finite,
        "same_bits": same,
        "ok": max(errors) <= allowed and finite and same,
    }


def _random(device: torch.device, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
