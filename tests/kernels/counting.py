"""A device that counts: launches, and the times when the host waits for it.

No GPU is needed. A tensor "on the device" wraps one on the CPU, which does the work, and PyTorch's dispatcher shows
every operation on it. What would make the host wait for a GPU counts as a wait: reading numbers, shapes that depend on
numbers, and copies in either direction, except asynchronous ones to the device.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from cl_dist.kernels import backend

DEVICE = torch.device("meta")
"""PyTorch accepts it in any build."""
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "_unique2")
NO_LAUNCH = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh")


class OnDevice(torch.Tensor):
    """A tensor on the counting device, around one on the CPU."""

    inner: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # results on the CPU stay plain tensors

    @staticmethod
    def __new__(cls: type[OnDevice], inner: torch.Tensor) -> OnDevice:
        """Wrap a CPU tensor."""
        outer: OnDevice = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=DEVICE
        )
        outer.inner = inner
        return outer

    def tolist(self) -> Any:
        """Copy to the host first, which PyTorch does itself for tensors that are no subclass."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse operations outside `Counting`, which would go uncounted."""
        raise RuntimeError(f"{function} outside Counting")


class Counting(TorchDispatchMode):
    """Counts what happens on the device inside the `with` block. Triton's launches count and run interpreted."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self.waits: list[str] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Counting:
        """Begin to count."""
        run = backend.Launch.run

        def counted(launch: backend.Launch) -> None:
            if 0 not in launch.grid:
                self.launches.append(launch.kernel.fn.__name__)
            run(backend.Launch(**{**vars(launch), "arguments": _unwrapped(dict(launch.arguments))}))

        self._patch.setattr(backend.Launch, "run", counted)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Stop."""
        super().__exit__(*error)
        self._patch.undo()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation on the CPU tensors, and count it."""
        kwargs = kwargs or {}
        wrapped: dict[int, OnDevice] = {}
        tree_map(lambda x: wrapped.setdefault(id(x.inner), x) if isinstance(x, OnDevice) else x, (args, kwargs))
        target = kwargs.get("device")
        if not wrapped and target != DEVICE:
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            self._copy(name, args, kwargs)
        elif name in WAITS or (name == "index" and any(x is not None and x.dtype == torch.bool for x in args[1])):
            self.waits.append(name)
        elif name not in NO_LAUNCH and not function.is_view:
            self.launches.append(name)
        plain, settings = _unwrapped(args), _unwrapped(kwargs)
        if target is not None:
            settings["device"] = torch.device("cpu")
        result = function(*plain, **settings)
        if target is not None and torch.device(target) != DEVICE:
            return result
        return tree_map(lambda x: _wrapped(x, wrapped) if isinstance(x, torch.Tensor) else x, result)

    def _copy(self, name: str, args: Any, kwargs: Any) -> None:
        if name == "copy_":
            to, source = (isinstance(x, OnDevice) for x in args[:2])
        else:
            source = isinstance(args[0], OnDevice)
            to = source if kwargs.get("device") is None else torch.device(kwargs["device"]) == DEVICE
        asynchronous = kwargs.get("non_blocking", False) and to
        if source != to and not asynchronous:
            self.waits.append(name)
        elif source == to:
            self.launches.append(name)


def _unwrapped(values: Any) -> Any:
    if type(values).__name__ == "TensorDescriptor":
        return type(values)(_unwrapped(values.base), values.shape, values.strides, values.block_shape)
    if isinstance(values, dict):
        return {name: _unwrapped(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return type(values)(_unwrapped(value) for value in values)
    return values.inner if isinstance(values, OnDevice) else values


def _wrapped(result: torch.Tensor, known: dict[int, OnDevice]) -> OnDevice:
    """Wrap a result; an operation in place returns the tensor that it was given."""
    found = known.get(id(result))
    return OnDevice(result) if found is None else found
