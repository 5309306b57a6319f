"""Reads a model's files for ZeRO-3 one tensor at a time.

transformers opens all files of the model on rank 0, fills one module's gathered parameters after another from them, and
keeps every tensor until the last is loaded: by then the whole model is mapped into rank 0's memory. Here it gets
handles instead, each of which maps its tensor for as long as it is being copied. The other ranks open no weights at
all, only the files' headers.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from torch.utils._pytree import tree_map_only
from transformers import modeling_utils

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""mallopt(3)"""
_PAGES_FROM = 256 << 10
"""Bytes from which on, during loading, an allocation gets pages of its own and returns them when it is freed."""
_HIGHEST_THRESHOLD = 32 << 20
"""Where the C library's own limit ends up in a process that allocates and frees large tensors; it trims at twice it."""


class StoredTensor:
    """A tensor in a file: shape and dtype are known, the values are read whenever they are used, and not kept.

    Args:
        like: Any tensor of its shape and dtype, which may be on the meta device.
        read: Returns the tensor.
    """

    is_meta = False

    def __init__(self, like: torch.Tensor, read: Callable[[], torch.Tensor]) -> None:
        self.shape, self.dtype, self._read = like.shape, like.dtype, read

    def __call__(self) -> torch.Tensor:
        """The values. transformers' conversions of weights call what is not yet a tensor."""
        return self._read()

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self()[key]

    def __getattr__(self, name: str) -> Any:
        """Whatever else a module's own way of loading asks of a tensor."""
        if name.startswith("__"):  # asked by copy and pickle, not of a tensor
            raise AttributeError(name)
        return getattr(self(), name)

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Read each stored operand of a torch function, such as the source of `parameter.copy_`."""
        args, kwargs = tree_map_only(cls, cls.__call__, (args, kwargs or {}))
        return function(*args, **kwargs)


@contextmanager
def one_tensor_at_a_time() -> Iterator[None]:
    """Inside the block, transformers gets handles (`StoredTensor`) for the tensors of weight files.

    It replaces a function of transformers, of a name that all supported releases have; tests/models/test_sharded.py
    measures its effect.
    """
    transformers: Any = modeling_utils
    plain = transformers.load_state_dict
    mallopt = _mallopt()

    def handles(checkpoint_file: str | os.PathLike[str], map_location: Any = "cpu", **settings: Any) -> dict[str, Any]:
        path = os.fspath(checkpoint_file)
        if map_location == "cpu" and path.endswith(".safetensors"):
            return {name: _in_safetensors(path, name, like) for name, like in plain(path, "meta", **settings).items()}
        # Files of before PyTorch 1.6 cannot be mapped, and are read at once.
        if map_location == "cpu" and is_zipfile(path):
            return {name: _in_zip(path, name, value) for name, value in plain(path, map_location, **settings).items()}
        whole: dict[str, Any] = plain(checkpoint_file, map_location, **settings)
        return whole

    # The C library would place each rank's small shard behind the whole tensor that it was cut from, and keep the gaps
    # that those leave: up to the size of the model.
    mallopt(_MMAP_THRESHOLD, _PAGES_FROM)
    transformers.load_state_dict = handles
    try:
        yield
    finally:
        transformers.load_state_dict = plain
        mallopt(_MMAP_THRESHOLD, _HIGHEST_THRESHOLD)
        mallopt(_TRIM_THRESHOLD, 2 * _HIGHEST_THRESHOLD)


def _mallopt() -> Callable[[int, int], object]:
    """The function of glibc's allocator; with another C library, one that does nothing."""
    try:
        found: Callable[[int, int], object] = ctypes.CDLL(None).mallopt
        return found
    except (OSError, AttributeError):
        return lambda parameter, value: None


def _in_safetensors(path: str, name: str, like: torch.Tensor) -> StoredTensor:
    def read() -> torch.Tensor:
        with safe_open(path, framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)  # mapped from the file until it is freed
        return tensor

    return StoredTensor(like, read)


def _in_zip(path: str, name: str, value: Any) -> Any:
    """A handle on a tensor in a file of `torch.save`; a value that is not a tensor is returned itself."""
    if not isinstance(value, torch.Tensor):
        return value

    def read() -> torch.Tensor:
        # Reading the file's table of contents takes milliseconds. Every tensor keeps the whole file mapped.
        tensor: torch.Tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)[name]
        return tensor

    return StoredTensor(value, read)
