"""The kernels' common ground: Triton if it is installed, numba on CPUs, and the choice between them for a tensor.

CUDA and HIP tensors go to Triton kernels and CPU tensors to numba kernels. All other tensors, and GPU tensors without
Triton, go to the plain PyTorch of `cl_dist.kernels.reference`.
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
import numpy.typing as npt
import torch
from numba.np.ufunc.parallel import threading_layer

# numba reads settings from a file in the working folder, where anybody may have left one. The file could point to a
# cache of compiled code, which numba unpickles. So ignore it; environment variables still work.
numba.core.config._config_fname = os.devnull
numba.core.config.reload_config()

OLDEST_TRITON = (3, 4)
"""The first release with everything that the kernels use (masked histograms); older ones count as absent. setup.py has
the releases that are tested."""


def release(package: types.ModuleType) -> tuple[int, ...]:
    """Return the first two numbers of a package's version."""
    return tuple(int(part) for part in package.__version__.split(".")[:2])


try:
    import triton
    import triton.language

    if release(triton) < OLDEST_TRITON:
        triton = None
except ImportError:  # Triton is an extra; a file with kernels imports without it
    triton = None
tl: Any = None if triton is None else triton.language

LANES = 128
"""Partial sums that a CPU kernel keeps side by side so that additions vectorise; `fold_lanes` adds them up.

The kernels are compiled with strict floating-point arithmetic. If the compiler could reorder sums or fuse a product
with an addition, it would do so differently in each variant, and one thread would not give the same bits as several.
"""

SMALL = 1 << 15
"""Below this many elements a CPU kernel uses one thread."""


def jit(kernel: Callable[..., Any]) -> Any:
    """Apply `triton.jit`; without Triton return the function unchanged, since nothing calls it then."""
    return kernel if triton is None else triton.jit(kernel)


def path_of(tensor: torch.Tensor) -> Literal["triton", "cpu", "torch"]:
    """Choose the implementation by a tensor's device. PyTorch calls AMD's devices "cuda" too."""
    if tensor.device.type == "cpu":
        return "cpu"
    return "triton" if tensor.device.type == "cuda" and triton is not None else "torch"


def on_amd() -> bool:
    """Whether PyTorch's GPUs are AMD's."""
    return torch.version.hip is not None


def allows_tf32() -> bool:
    """Whether PyTorch multiplies float32 matrices on GPUs in TF32, however that was set.

    Once the newer of its two interfaces (`fp32_precision`, since 2.9) was used, reading the older one raises an error.
    The newer one can always be read, and follows the older one.
    """
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, "fp32_precision"):
        return bool(matmul.fp32_precision == "tf32")
    return torch.get_float32_matmul_precision() != "highest"


def power_of_two(number: int) -> int:
    """Round up to a power of two, as Triton's block sizes must be."""
    return 1 << max(number - 1, 0).bit_length()


def blocks(number: int, block: int) -> int:
    """Return how many blocks of `block` elements cover `number` elements."""
    return -(-number // block)


def sent(numbers: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy numbers to a device; the host does not wait for a GPU that is still busy."""
    tensor = torch.from_numpy(numbers)
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def on_device_of(tensor: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current, because Triton launches on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel, with everything that determines what gets compiled.

    Operations build their launches in functions that never read a tensor's contents. So tests can compile exactly what
    a run would (`tests/kernels/launches.py`) from tensors on the "meta" device, without a GPU.
    """

    kernel: Any
    """The function under `jit`."""
    grid: tuple[int, ...]
    """Programs along each axis. With a zero among them the launch does nothing."""
    arguments: Mapping[str, Any]
    """All parameters of the kernel by name: tensors, numbers and `tl.constexpr` values."""
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
    """A function that numba compiles on its first call, in one variant for one thread and one for several.

    The function uses `numba.prange` over blocks of work that do not depend on the number of threads. With one thread it
    runs the variant without a thread pool: a rank with OMP_NUM_THREADS=1 wants that, and GNU's OpenMP does not work in
    a process whose parent used it before the fork.

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
        """Run with PyTorch's number of threads."""
        return self.sized(SMALL)(*arguments)

    def sized(self, elements: int) -> Any:
        """Return the variant for this many elements: a small job finishes before threads have woken up."""
        return self.parallel if elements >= SMALL and _pool.threads() > 1 else self.serial


def cpu_jit(function: Callable[..., Any]) -> CpuKernel:
    """Turn a function into a numba kernel (a decorator)."""
    return CpuKernel(function)


def cpu_part(function: Callable[..., Any]) -> Any:
    """Compile a function that numba kernels call (a decorator)."""
    return numba.njit(function, error_model="numpy", nogil=True)


@cpu_part
def fold_lanes(lanes: Any) -> Any:
    """Add up `LANES` partial sums in a fixed order."""
    half = LANES // 2
    while half > 0:
        for lane in range(half):
            lanes[lane] += lanes[half + lane]
        half //= 2
    return lanes[0]


def _compiled(function: Callable[..., Any], parallel: bool) -> Callable[..., Any]:
    """Return a version of `function` that is compiled once for every combination of argument types."""
    kernels: dict[tuple[Any, ...], Any] = {}

    def call(*arguments: Any) -> Any:
        kinds = tuple(_kind(argument) for argument in arguments)
        kernel = kernels.get(kinds)
        if kernel is None:
            kernel = kernels[kinds] = _variant(function, parallel, kinds)
        try:
            return kernel(*arguments)
        except OSError:  # the disk of numba's cache is full; the kernel is compiled but has not run yet
            return kernel(*arguments)

    return call


def _kind(argument: Any) -> Any:
    """Return what numba specialises the code on for an argument."""
    if isinstance(argument, np.ndarray):
        return argument.dtype.str, argument.ndim, argument.flags.c_contiguous, argument.flags.writeable
    return type(argument).__name__


def _variant(function: Callable[..., Any], parallel: bool, kinds: tuple[Any, ...]) -> Any:
    options: dict[str, Any] = {"parallel": parallel, "error_model": "numpy", "nogil": True}
    # numba's disk cache is keyed by the function's name. So the name includes the options, or new options would load
    # old code; and the types, or two processes that compile at the same time could load each other's code.
    name = f"{function.__name__}_{zlib.crc32(repr([kinds, options]).encode()):08x}"
    copy = types.FunctionType(function.__code__, function.__globals__, name)
    copy.__qualname__, copy.__module__ = name, function.__module__
    try:
        return numba.njit(copy, cache=True, **options)
    except RuntimeError:  # neither the package's nor the user's cache folder can be written
        return numba.njit(copy, cache=False, **options)


class _Pool:
    """numba's thread pool. It is OpenMP's, as PyTorch's is, so that the two do not compete for cores."""

    def __init__(self) -> None:
        self._process: int | None = None
        """The process that started the threads."""
        self._safe = False

    def threads(self) -> int:
        """Return how many threads a kernel may use: PyTorch's number, or one after a fork, which loses the pool."""
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
        numba.set_num_threads(1)  # starts the threads, and sets OpenMP's thread count to the number of cores
        torch.set_num_threads(before)
        # The only other layer, numba's work queue, aborts a process that uses it from two threads at once.
        self._safe = threading_layer() in ("omp", "tbb")
        self._process = os.getpid()


_pool = _Pool()
