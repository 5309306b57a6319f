"""What the kernels stand on: Triton where it is installed, numba on CPUs, and which of the two serves a tensor.

CUDA and HIP tensors go to Triton kernels and CPU tensors to numba kernels. Any other tensor, and a GPU tensor where
Triton is not installed, is served by the plain PyTorch of `cl_dist.kernels.reference`.
"""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numba
import torch
from numba.np.ufunc.parallel import threading_layer

try:
    import triton
    import triton.language as tl
except ImportError:  # Triton is an extra; a file with kernels imports without it
    triton = tl = None

FAST_MATH = frozenset({"reassoc", "contract", "nsz"})
"""What a CPU kernel may do to arithmetic: reorder sums, so that they vectorise. NaN and Inf keep their meaning."""

SMALL = 1 << 15
"""Elements below which a CPU kernel does not use several threads."""


def jit(kernel: Callable[..., Any]) -> Any:
    """`triton.jit`; without Triton the function as it is, which nobody calls then."""
    return kernel if triton is None else triton.jit(kernel)


def path_of(tensor: torch.Tensor) -> Literal["triton", "cpu", "torch"]:
    """Which implementation serves a tensor, by where it lies. PyTorch calls AMD's devices "cuda" too."""
    if tensor.device.type == "cpu":
        return "cpu"
    return "triton" if tensor.device.type == "cuda" and triton is not None else "torch"


def power_of_two(number: int) -> int:
    """Smallest power of two that is at least `number`: Triton's block sizes are powers of two."""
    return 1 << max(number - 1, 0).bit_length()


def blocks(number: int, block: int) -> int:
    """How many blocks of `block` cover `number` elements."""
    return -(-number // block)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, with everything that decides what is compiled.

    Operations build their launches in functions that never look at a tensor's contents, so that tests compile exactly
    what a run would (`tests/kernels/launches.py`), without a GPU and from tensors on the "meta" device.
    """

    kernel: Any
    """The function under `jit`."""
    grid: tuple[int, ...]
    """Programs along each axis. A launch with an empty axis does nothing."""
    arguments: Mapping[str, Any]
    """All of the kernel's parameters by name: tensors, numbers and the `tl.constexpr` ones."""
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        """Launch the kernel on the device of its first tensor."""
        if 0 in self.grid:
            return
        first = next(value for value in self.arguments.values() if isinstance(value, torch.Tensor))
        with on_device_of(first):
            self.kernel[self.grid](**self.arguments, num_warps=self.num_warps, num_stages=self.num_stages)


class CpuKernel:
    """A function compiled by numba when it is first called, for one thread and for several.

    The function is written once, with `numba.prange` over blocks of work that do not depend on the number of threads.
    With one thread the variant without a thread pool runs: that is what a rank with OMP_NUM_THREADS=1 wants, and
    GNU's OpenMP cannot be used in a process whose parent has used it before the fork.

    Args:
        function: Takes numpy arrays and numbers.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__doc__ = function.__doc__

    @cached_property
    def serial(self) -> Any:
        """The variant for one thread."""
        return _compiled(self.function, parallel=False)

    @cached_property
    def parallel(self) -> Any:
        """The variant for PyTorch's number of threads."""
        return _compiled(self.function, parallel=True)

    def __call__(self, *arguments: Any) -> Any:
        """Run with as many threads as PyTorch uses."""
        return self.sized(SMALL)(*arguments)

    def sized(self, elements: int) -> Any:
        """Return the variant for work on so many elements: little work is done before threads have been woken."""
        return self.parallel if elements >= SMALL and _pool.threads() > 1 else self.serial


def cpu_jit(function: Callable[..., Any]) -> CpuKernel:
    """Make a numba kernel of a function (a decorator)."""
    return CpuKernel(function)


def cpu_part(function: Callable[..., Any]) -> Any:
    """Make a function that numba kernels call (a decorator). It is compiled once for both variants of its callers.

    Sums over many elements belong here: compiled as part of each variant, they could be vectorised differently, and
    then one thread and several would not give the same bits.
    """
    return numba.njit(function, fastmath=set(FAST_MATH), error_model="numpy", nogil=True)


def _compiled(function: Callable[..., Any], parallel: bool) -> Any:
    # numba's cache on disk goes by the name alone: the two variants need different ones.
    name = f"{function.__name__}_{'parallel' if parallel else 'serial'}"
    copy = types.FunctionType(function.__code__, function.__globals__, name)
    copy.__qualname__, copy.__module__ = name, function.__module__
    options: dict[str, Any] = {"parallel": parallel, "fastmath": set(FAST_MATH), "error_model": "numpy", "nogil": True}
    try:
        return numba.njit(copy, cache=True, **options)
    except RuntimeError:  # neither the package's nor the user's cache folder can be written
        return numba.njit(copy, cache=False, **options)


class _Pool:
    """numba's thread pool: OpenMP's, which is PyTorch's too, so that the two do not wait for each other's cores."""

    def __init__(self) -> None:
        self._process: int | None = None
        """The process in which the threads were started."""
        self._safe = False

    def threads(self) -> int:
        """How many threads a kernel may use now: PyTorch's number, or one after a fork that lost the pool."""
        wanted = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
        if wanted == 1:
            return 1
        if self._process is None:
            self._start()
        if self._process != os.getpid() or not self._safe:
            return 1
        numba.set_num_threads(wanted)
        return wanted

    def _start(self) -> None:
        before = torch.get_num_threads()
        numba.set_num_threads(1)  # starts the threads, and sets OpenMP's number of threads to that of all cores
        torch.set_num_threads(before)
        # The remaining layer, numba's work queue, ends a process that uses it from two threads at once.
        self._safe = threading_layer() in ("omp", "tbb")
        self._process = os.getpid()


_pool = _Pool()
