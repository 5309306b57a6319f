"""Matrix products in bfloat16 on CPUs without instructions for them, computed in float32.

There torch multiplies bfloat16 with portable loops of its own: 0.1 to 1 GFLOP/s if neither operand is contiguous along
the summed dimension in the way the loop wants (`grad @ weight`, the gradient of every linear layer's input), and a
third of float32's speed in the best case. All products go through a handful of operators, whoever calls them (PyTorch's
layers, DeepSpeed's stage 3 linear, adapters, attention, row skipping), so these get another CPU kernel.
`benchmarks/bfloat16.py` measures both.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger(__name__)

PIECE_ELEMENTS = 1 << 20
"""Elements of a float32 copy of a piece of the larger operand. Pieces that stay in the cache are twice as fast as new
pages of memory, and a 7B model's head is never converted whole."""
THIN = 6
"""With fewer rows or columns than this, torch's dot products in bfloat16 beat a conversion, which reads every weight
twice (one thread, 2048 x 2048: 4 rows take 1.1 ms against 1.3, 8 rows 2.7 against 1.7)."""

_Kernel = Callable[..., Any]


def lacks_instructions() -> bool:
    """Whether torch has no fast matrix products in bfloat16 on this CPU, by torch's own criterion.

    They are oneDNN's, which heeds ONEDNN_MAX_CPU_ISA; ATEN_CPU_CAPABILITY changes nothing about them. A build of torch
    without oneDNN has none.
    """
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def mend_products() -> None:
    """Compute bfloat16 products on the CPU in float32 from now on, in this process, if its CPU needs that.

    The results are rounded to bfloat16 once, after float32 sums, so they are at least as exact. Other dtypes and
    devices, and CPUs with the instructions, keep torch's kernels.
    """
    global _installed
    if _installed is not None or not lacks_instructions():
        return
    if not hasattr(torch.library, "get_kernel"):
        logger.warning("train.dtype: bfloat16 is very slow on this CPU with torch %s; 2.9 mends it", torch.__version__)
        return
    logger.warning(
        "train.dtype: torch uses no bfloat16 instructions on this CPU; matrix products are computed in float32"
    )
    _installed = FloatProducts()


class FloatProducts:
    """The replaced kernels; `remove` restores torch's own."""

    def __init__(self) -> None:
        self._library = torch.library.Library("aten", "IMPL")
        replacements: dict[str, Callable[[_Kernel], _Kernel]] = {
            "mm": _matrix_kernel,
            "mm.out": _matrix_kernel,
            "addmm": _added_kernel,
            "addmm.out": _added_kernel,
            "bmm": _matrix_kernel,
            "bmm.out": _matrix_kernel,
            "baddbmm": _added_kernel,
            "baddbmm.out": _added_kernel,
            _ATTENTION_BACKWARD: _attention_kernel,
        }
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
            for name, replacement in replacements.items():
                kernel = replacement(torch.library.get_kernel(f"aten::{name}", "CPU").call_boxed)
                self._library.impl(name, kernel, "CPU", with_keyset=True)

    def remove(self) -> None:
        """Restore torch's kernels."""
        self._library._destroy()


_ATTENTION_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
_installed: FloatProducts | None = None


def _matrix_kernel(plain: _Kernel) -> _Kernel:
    """The kernel of `mm` and `bmm`, with and without `out`."""

    def kernel(keys: Any, a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
        if _slow(a, b) and (out is None or out.dtype == torch.bfloat16):
            return in_float32(a, b, out=out)
        product: torch.Tensor = plain(keys, a, b) if out is None else plain(keys, a, b, out=out)
        return product

    return kernel


def _added_kernel(plain: _Kernel) -> _Kernel:
    """The kernel of `addmm` and `baddbmm`, with and without `out`."""

    def kernel(
        keys: Any,
        addend: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        *,
        beta: float = 1,
        alpha: float = 1,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if _slow(a, b) and addend.dtype == torch.bfloat16 and (out is None or out.dtype == torch.bfloat16):
            return in_float32(a, b, addend, beta, alpha, out)
        target = {} if out is None else {"out": out}
        result: torch.Tensor = plain(keys, addend, a, b, beta=beta, alpha=alpha, **target)
        return result

    return kernel


def _attention_kernel(plain: _Kernel) -> _Kernel:
    """The kernel of the backward pass of `scaled_dot_product_attention`, whose products never leave its own loop.

    The forward pass is as fast as in float32.
    """

    def kernel(keys: Any, *tensors: Any, attn_mask: torch.Tensor | None = None, **settings: Any) -> Any:
        if tensors[1].dtype != torch.bfloat16:
            return plain(keys, *tensors, attn_mask=attn_mask, **settings)
        wide = [each.float() if isinstance(each, torch.Tensor) else each for each in tensors]
        is_bias = attn_mask is not None and attn_mask.is_floating_point()
        gradients = plain(keys, *wide, attn_mask=attn_mask.float() if is_bias else attn_mask, **settings)  # type: ignore[union-attr]
        return tuple(gradient.bfloat16() for gradient in gradients)

    return kernel


def _slow(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether `a @ b` (two matrices, or batches of them) is better computed in float32.

    Operands that do not fit together are left to torch, which says what is wrong.
    """
    if not a.dtype == b.dtype == torch.bfloat16 or a.dim() != b.dim() or a.shape[-1] != b.shape[-2]:
        return False
    are_dot_products = a.stride(-1) == 1 and b.stride(-2) == 1
    return not (are_dot_products and min(a.shape[-2], b.shape[-1]) < THIN)


def in_float32(
    a: torch.Tensor,
    b: torch.Tensor,
    addend: torch.Tensor | None = None,
    beta: float = 1,
    alpha: float = 1,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `alpha * a @ b + beta * addend` in float32, rounded to bfloat16 once at the end.

    The smaller operand is converted whole and the larger one in pieces.

    Args:
        a: `(..., m, k)` bfloat16.
        b: `(..., k, n)` bfloat16.
        addend: Expands to `(..., m, n)`; ignored with `beta` 0.
        beta: Factor of `addend`.
        alpha: Factor of the product.
        out: Written to and returned, where there is one.
    """
    shape = (*a.shape[:-1], b.shape[-1])
    result = a.new_empty(shape) if out is None else out.resize_(shape)
    target, addend = result, None if addend is None else addend.expand(shape)
    if a.numel() > b.numel():  # (a b)^T = b^T a^T, whose larger operand is the second
        a, b, target, addend = b.mT, a.mT, target.mT, None if addend is None else addend.mT
    whole = a.float()
    columns = max(1, PIECE_ELEMENTS // max(1, b.shape[:-1].numel(), a.shape[:-1].numel()))
    for start in range(0, b.shape[-1], columns):
        piece = slice(start, start + columns)
        product = torch.matmul(whole, b[..., piece].float()).mul_(alpha)
        if addend is not None and beta != 0:
            product.add_(addend[..., piece], alpha=beta)
        target[..., piece] = product
    return result
