"""Every Triton kernel in the launch configurations that runs use.

`test_compiled.py` checks what the compilers make of them, and `python -m tests.kernels.aot` prints it.

To add a kernel, append `Case`s to `CASES`: a name, a function without arguments that builds the operation's
`kernels.backend.Launch` (from tensors on the "meta" device, through the same function that the operation itself calls),
which memory instructions have to be 16 bytes wide, and the occupancy that the kernel states.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

import cl_dist.kernels  # noqa: F401  modules are looked up by name below: functions hide them
from cl_dist.kernels.backend import Launch


@dataclass(frozen=True)
class Case:
    """One launch, and what its compiled code must look like."""

    name: str
    build: Callable[[], Launch]
    wide: Literal["load", "store", ""] = "load"
    """A streaming kernel's accesses to global memory of this kind: 16 bytes per thread, on every target."""
    narrow: int = 0
    """Narrower accesses that the compiled code may also contain: of sums, one per token. Masks do not count."""
    warps: int = 16
    """Resident warps of 32 threads per NVIDIA multiprocessor that registers and shared memory allow (of 64)."""
    waves: int = 32
    """Resident waves of 64 threads per AMD compute unit (of 32)."""
    targets: tuple[str, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
    """GPUs that this launch runs on."""
    long: bool = True
    """Addresses are computed from the program's number in 64 bits, for tensors of more than 2^31 elements."""


def module(name: str) -> Any:
    """Return the module of an operation."""
    return sys.modules[f"cl_dist.kernels.{name}"]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor without memory."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def _sum(dtype: torch.dtype, tokens: int, rows: int, per_token: bool = True, masked: bool = True) -> Launch:
    counted = meta(tokens, dtype=torch.bool) if masked else None
    blocks = -(-tokens // module("row_magnitude").TOKEN_BLOCK)
    return module("row_magnitude")._sum_launch(meta(tokens, rows, dtype=dtype), counted, per_token, meta(blocks, rows))


def _fold(blocks: int, rows: int) -> Launch:
    return module("row_magnitude")._fold_launch(meta(blocks, rows), meta(rows))


def _fold_all(blocks: int) -> Launch:
    layers = [(4096 * 4, 4096), (11008 * 2, 11008), (4096, 4096)]
    outputs = tuple((blocks * 42496 * n + blocks * at, blocks, rows, at) for n in range(4) for at, rows in layers)
    return module("row_magnitude")._fold_all_launch(meta(1 << 25), outputs, meta(1 << 20, dtype=torch.float64))


def _choose(dtype: torch.dtype) -> Launch:
    total, layers, integer = 224 * 4096, 224, {"dtype": torch.int64}
    keep = meta(total, dtype=torch.bool)
    table = meta(2, layers + 1, **integer)
    choose = module("topk_row_mask")._choose_launch
    return choose(meta(total, dtype=dtype), table, keep, meta(total, **integer), meta(layers, **integer))


def _zero(dtype: torch.dtype, start: int, row_length: int) -> Launch:
    keep = meta(4096, dtype=torch.bool)
    return module("apply_row_mask")._launch(meta(2048 * row_length, dtype=dtype), start, row_length, keep)


def _product(
    dtype: torch.dtype, out_features: int, in_features: int, kept: int, into: bool = False, tf32: bool = False
) -> Launch:
    operation, integer = module("weight_grad_on_gpu"), {"dtype": torch.int64}
    gather = in_features <= operation.GATHERED_FEATURES
    dy = meta(4096, out_features if gather else -(-kept // 16) * 16, dtype=dtype)
    grad, settings = meta(out_features, in_features, dtype=dtype), torch.backends.cuda.matmul
    before, settings.fp32_precision = settings.fp32_precision, "tf32" if tf32 else "ieee"
    try:
        return operation._tile_launch(
            meta(4096, in_features, dtype=dtype), dy, meta(kept, **integer), grad, into, gather
        )
    finally:
        settings.fp32_precision = before


def _columns(dtype: torch.dtype, out_features: int, in_features: int, transposed: bool = False) -> Launch:
    """The kept columns, read in place, of a layer with as few outputs as those that do that."""
    operation, kept = module("weight_grad_on_gpu"), round(0.3 * in_features)
    x, dy = meta(4096, in_features, dtype=dtype), meta(4096, out_features, dtype=dtype)
    grad = meta(kept, out_features, dtype=dtype) if transposed else meta(out_features, kept, dtype=dtype).t()
    return operation._tile_launch(dy, x, meta(kept, dtype=torch.int64), grad, False, True, compact=True)


def _copied(dtype: torch.dtype, kept: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns, integer = -(-kept // 16) * 16, {"dtype": torch.int32}
    return meta(4096, columns, dtype=dtype), meta(11008, **integer), meta(kept, dtype=torch.int64)


def _copy(dtype: torch.dtype) -> Launch:
    copy, places, rows = _copied(dtype, 3303)
    return module("weight_grad_on_gpu")._copy_launch(meta(4096, 11008, dtype=dtype), rows, copy, places)


def _spread(dtype: torch.dtype) -> Launch:
    places, grad = meta(11008, dtype=torch.int32), meta(11008, 4096, dtype=dtype)
    return module("weight_grad_on_gpu")._spread_launch(meta(3303, 4096, dtype=dtype), places, grad)


def _persistent(dtype: torch.dtype) -> Launch:
    x, grad = meta(4096, 4096, dtype=dtype), meta(11008, 4096, dtype=dtype)
    return module("weight_grad_on_gpu")._persistent_launch(x, *_copied(dtype, 3303), grad)


def _bias(dtype: torch.dtype) -> Launch:
    rows, grad = meta(1229, dtype=torch.int64), meta(4096, dtype=dtype)
    return module("weight_grad_on_gpu")._bias_launch(meta(4096, 4096, dtype=dtype), rows, grad, False)


def _importance(dtype: torch.dtype, numel: int = 1 << 24, order: int = 3) -> Launch:
    tensors = meta(numel, dtype=dtype), meta(numel, dtype=dtype), meta(numel), meta(numel)
    return module("importance_update")._update_launch(tensors, (order, 0.85, 0.15, 0.85, 0.15))


def _step(dtype: torch.dtype, start: int, length: int, columns: bool = False) -> Launch:
    operation, layout = module("adamw_rows"), module("rows").RowLayout(1, 1 << 21, length, columns)
    state = operation.AdamWState(*(meta(2048 * length, dtype=dtype) for _ in range(4)))
    keep = meta(layout.total, dtype=torch.bool)
    piece = operation.RowPiece(0, 2048 * length, start, layout, keep)
    return operation._launch(state, piece, meta(8, dtype=torch.float64))


BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64

CASES = [
    Case("row_magnitude, 8192 × 1024 bf16", partial(_sum, BF16, 8192, 1024)),
    Case("row_magnitude, 8192 × 4096 bf16", partial(_sum, BF16, 8192, 4096)),
    Case("row_magnitude, 8192 × 4096 fp16", partial(_sum, FP16, 8192, 4096)),
    # AMD's GPUs keep the tile in flight in registers, others in shared memory; Triton 3.6 needs 68 of them here.
    Case("row_magnitude, 8192 × 4096 fp32", partial(_sum, FP32, 8192, 4096), waves=24),
    Case("row_magnitude, 8192 × 11008 bf16", partial(_sum, BF16, 8192, 11008)),
    Case("row_magnitude, 8192 × 28672 bf16", partial(_sum, BF16, 8192, 28672), warps=32),
    Case(
        "row_magnitude, batch, 8192 × 4096 bf16",
        partial(_sum, BF16, 8192, 4096, per_token=False, masked=False),
        warps=32,
    ),
    Case("row_magnitude, lora_A, 8192 × 8 bf16", partial(_sum, BF16, 8192, 8), wide="", warps=32),
    Case("row_magnitude, fold, 256 × 4096", partial(_fold, 256, 4096), warps=32, long=False),
    # The table is read number by number, and the totals 8 bytes at a time.
    Case("row_magnitude, fold of all layers", partial(_fold_all, 128), narrow=5, warps=32, long=False),
    Case("topk_row_masks, 224 layers, fp32", partial(_choose, FP32), wide="", long=False),
    Case("topk_row_masks, 224 layers, fp64", partial(_choose, FP64), wide="", long=False),
    Case("apply_row_mask_, rows of 4096, bf16", partial(_zero, BF16, 0, 4096), wide="store", warps=48),
    Case("apply_row_mask_, rows of 11008, fp32", partial(_zero, FP32, 2**33, 11008), wide="store", warps=48),
    Case("apply_row_mask_, from any element, bf16", partial(_zero, BF16, 1, 4096), wide="", warps=48),
    Case(
        "masked_weight_grad, 11008 × 4096 bf16", partial(_product, BF16, 11008, 4096, 3303), wide="", warps=8, waves=8
    ),
    Case(
        "masked_weight_grad, 11008 × 4096 fp16", partial(_product, FP16, 11008, 4096, 3303), wide="", warps=8, waves=8
    ),
    Case("masked_weight_grad, 11008 × 4096 fp32", partial(_product, FP32, 11008, 4096, 3303), wide="", waves=16),
    Case(
        "masked_weight_grad, 11008 × 4096 tf32",
        partial(_product, FP32, 11008, 4096, 3303, tf32=True),
        wide="",
        warps=8,
        waves=8,
    ),
    Case(
        "masked_weight_grad, added to, bf16",
        partial(_product, BF16, 4096, 11008, 1229, into=True),
        wide="",
        warps=8,
        waves=8,
    ),
    Case("masked_weight_grad, gathered, bf16", partial(_product, BF16, 4096, 512, 1229), wide="", warps=8, waves=16),
    Case("masked_weight_grad, gathered, fp32", partial(_product, FP32, 4096, 512, 1229), wide="", warps=8, waves=16),
    Case(
        "masked_weight_grad, gathered, tf32",
        partial(_product, FP32, 4096, 512, 1229, tf32=True),
        wide="",
        warps=8,
        waves=8,
    ),
    Case("masked_weight_grad, lora_A, bf16", partial(_product, BF16, 8, 4096, 3), wide="", waves=4),
    Case("masked_weight_grad, lora_B, bf16", partial(_product, BF16, 4096, 8, 1229), wide="", warps=8, waves=24),
    Case("column_weight_grad, 512 × 4096 bf16", partial(_columns, BF16, 512, 4096), wide="", warps=8, waves=16),
    Case("column_weight_grad, 512 × 4096 fp32", partial(_columns, FP32, 512, 4096), wide="", warps=8, waves=16),
    Case("column_weight_grad, lora_A, bf16", partial(_columns, BF16, 8, 4096), wide="", warps=8, waves=20),
    Case(
        "column_weight_grad, transposed, 512 × 4096 bf16",
        partial(_columns, BF16, 512, 4096, transposed=True),
        wide="",
        warps=8,
        waves=16,
    ),
    # The places of the rows are stored one by one.
    Case("masked_weight_grad, copy, bf16", partial(_copy, BF16), wide="store", narrow=1, warps=32),
    Case("masked_weight_grad, spread, bf16", partial(_spread, BF16), wide="store", warps=32),
    Case(
        "masked_weight_grad, persistent, 11008 × 4096 bf16",
        partial(_persistent, BF16),
        wide="store",
        warps=8,
        targets=("sm_90", "sm_100"),
        long=False,
    ),
    Case("adamw_rows_, rows of 4096, fp32", partial(_step, FP32, 2**33, 4096), narrow=8),
    Case("adamw_rows_, rows of 4096, bf16", partial(_step, BF16, 0, 4096), narrow=8, waves=24),
    Case("adamw_rows_, from any element, fp32", partial(_step, FP32, 1, 4096), wide=""),
    Case("adamw_rows_, columns, fp32", partial(_step, FP32, 0, 4096, columns=True), wide=""),
    Case("masked_weight_grad, bias, bf16", partial(_bias, BF16), wide="", warps=32, waves=32),
    Case("importance_update_, fp32", partial(_importance, FP32), warps=40, waves=32),
    Case("importance_update_, first order, fp32", partial(_importance, FP32, order=1), warps=40, waves=32),
    Case(
        "importance_update_, fp32 and no multiple of 16",
        partial(_importance, FP32, numel=(1 << 24) - 3),
        narrow=32,
        waves=32,
    ),
]
