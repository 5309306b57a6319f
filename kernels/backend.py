"""What the kernels stand on: Triton where it is installed, numba on CPUs, and which of the two serves a tensor.

CUDA and HIP tensors go to Triton kernels and CPU tensors to numba kernels. Any other tensor, and a GPU tensor where
Triton is not installed, is served by the plain PyTorch of `cl_dist.kernels.reference`.
"""

from __future__ import annotations

import os
import types
import zlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numba
import numpy as np
import torch
from numba.np.ufunc.parallel import threading_layer

# numba reads settings from a file in the working folder, where anybody may have left one: where its compiled code is
# kept, for example, which it unpickles. Settings by environment variables stay.
numba.core.config._config_fname = os.devnull
numba.core.config.reload_config()

OLDEST_TRITON = (3, 4)
"""The first release with everything that the kernels use (masked histograms); an older one counts as absent."""

try:
    import triton
    import triton.language

    if tuple(int(part) for part in triton.__version__.split(".")[:2]) < OLDEST_TRITON:
        triton = None
except ImportError:  # Triton is an extra; a file with kernels imports without it
    triton = None
tl: Any = None if triton is None else triton.language

LANES = 128
"""Sums that a CPU kernel keeps side by side, so that adding to them vectorises; `fold_lanes` adds them up.

Kernels are compiled for strict arithmetic. With leave to reorder sums or to fuse a product with an addition, the
compiler uses it differently from variant to variant, and one thread and several would not give the same bits.
"""

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
    """Make a function that numba kernels call (a decorator)."""
    return numba.njit(function, error_model="numpy", nogil=True)


@cpu_part
def fold_lanes(lanes: Any) -> Any:
    """Add `LANES` sums up, in a fixed order."""
    half = LANES // 2
    while half > 0:
        for lane in range(half):
            lanes[lane] += lanes[half + lane]
        half //= 2
    return lanes[0]


def _compiled(function: Callable[..., Any], parallel: bool) -> Callable[..., Any]:
    """Return `function` compiled, once for every combination of argument types."""
    kernels: dict[tuple[Any, ...], Any] = {}

    def call(*arguments: Any) -> Any:
        kinds = tuple(_kind(argument) for argument in arguments)
        kernel = kernels.get(kinds)
        if kernel is None:
            kernel = kernels[kinds] = _variant(function, parallel, kinds)
        try:
            return kernel(*arguments)
        except OSError:  # the cache's disk is full: the kernel is compiled, has not run, and is not on the disk
            return kernel(*arguments)

    return call


def _kind(argument: Any) -> Any:
    """What of an argument decides the code that is compiled for it."""
    if isinstance(argument, np.ndarray):
        return argument.dtype.str, argument.ndim, argument.flags.c_contiguous, argument.flags.writeable
    return type(argument).__name__


def _variant(function: Callable[..., Any], parallel: bool, kinds: tuple[Any, ...]) -> Any:
    options: dict[str, Any] = {"parallel": parallel, "error_model": "numpy", "nogil": True}
    # numba's cache on disk goes by the function's name. One name for several ways to compile it would give old code for
    # new options; one for several types, and two processes that compile at once could get each other's.
    name = f"{function.__name__}_{zlib.crc32(repr([kinds, options]).encode()):08x}"
    copy = types.FunctionType(function.__code__, function.__globals__, name)
    copy.__qualname__, copy.__module__ = name, function.__module__
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
