"""Out of memory, in the words of PyTorch, cuBLAS, NCCL, numpy and Python."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.engine.memory_errors import reporting_exhausted_memory, where_exhausted
from cl_dist.errors import ClDistError
from cl_dist.heartbeat import beat

CUDA = (
    "CUDA out of memory. Tried to allocate 1.95 GiB. GPU 0 has a total capacity of 14.57 GiB of which 1.58 GiB is "
    "free. Including non-PyTorch memory, this process has 12.97 GiB memory in use. Of the allocated memory {used} is "
    "allocated by PyTorch, and {held} is reserved by PyTorch but unallocated. If reserved but unallocated memory is "
    "large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  See documentation for "
    "Memory Management  (https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
)
FULL, FRAGMENTED = CUDA.format(used="12.02 GiB", held="33.93 MiB"), CUDA.format(used="9.00 GiB", held="3.50 GiB")
CUBLAS = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
NCCL = (
    "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled cuda error (run with "
    "NCCL_DEBUG=INFO for details), NCCL version 2.28.9\nncclUnhandledCudaError: Call to CUDA function failed.\n"
    "Last error:\nCuda failure 2 'out of memory'"
)
NCCL_CALLOC = NCCL.replace("Cuda failure 2 'out of memory'", "Failed to CUDA calloc async 608 bytes")
ASYNCHRONOUS = "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"
EXPANDABLE, TRITON = "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory"


def recipe(*changes: str) -> Recipe:
    return load_recipe("quickstart", ["train.micro_batch_size=6", "train.max_length=64", "zero.stage=1", *changes])[0]


def message(error: BaseException, phase: str, *changes: str, world: int = 2) -> str:
    beat(phase)
    with pytest.raises(ClDistError) as caught, reporting_exhausted_memory(3, world, recipe(*changes)):
        raise error
    assert caught.value.exit_code == 1
    return str(caught.value)


def test_training_on_a_gpu() -> None:
    assert message(torch.OutOfMemoryError(FULL), "training task a, step 1") == (
        "rank 3 ran out of GPU memory while training task a, step 1: 1.9 GiB asked for, 1.6 GiB of 14.6 GiB free; try "
        "in this order: train.micro_batch_size=3 with train.gradient_accumulation=2 (the same global batch); "
        "train.activation_checkpointing=true (in a new run); zero.stage=2 or 3; zero.offload=true; more ranks or "
        "nodes; a shorter train.max_length (now 64; in a new run)"
    )


def test_only_what_the_recipe_does_not_do_yet() -> None:
    changes = ("train.micro_batch_size=1", "train.activation_checkpointing=true", "zero.stage=3", "zero.offload=true")
    text = message(torch.OutOfMemoryError(FULL), "training task a, step 9", *changes)
    assert text.endswith("order: more ranks or nodes; a shorter train.max_length (now 64; in a new run)")


def test_fragmented_memory_comes_first() -> None:
    text = message(torch.OutOfMemoryError(FRAGMENTED), "training task a, step 9")
    expected = (
        "PYTORCH_ALLOC_CONF=expandable_segments:True in the environment (3.5 GiB are held but unused); train.micro"
    )
    assert f"try in this order: {expected}" in text


def test_in_evaluation() -> None:
    assert "order: eval.batch_size=8; zero" in message(
        torch.OutOfMemoryError(FULL), "evaluating a", "eval.batch_size=16"
    )
    general = message(
        torch.OutOfMemoryError(FULL), "general ability: hellaswag", "eval.general={tasks: [hellaswag], batch_size: 4}"
    )
    assert "order: eval.general.batch_size=2; " in general


def test_while_the_engine_is_built_the_batch_is_not_to_blame() -> None:
    text = message(torch.OutOfMemoryError(FULL), "building the engine", world=1)
    assert text.endswith("try in this order: zero.offload=true; more ranks or nodes; model.lora (in a new run)")


@pytest.mark.parametrize("text", [CUBLAS, NCCL, NCCL_CALLOC, ASYNCHRONOUS, EXPANDABLE, TRITON])
def test_libraries_without_a_class_for_it(text: str) -> None:
    assert message(RuntimeError(text), "training task a, step 1").startswith(
        "rank 3 ran out of GPU memory while training task a, step 1; try in this order: train.micro_batch_size=3"
    )


def test_the_hosts_memory() -> None:
    """Real errors, of allocations that no machine can satisfy."""
    total = int(re.findall(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[0]) / 2**20
    for allocate in (lambda: torch.empty(1 << 50, dtype=torch.int8), lambda: np.empty(1 << 50, dtype=np.int8)):
        with pytest.raises((RuntimeError, MemoryError)) as caught:
            allocate()
        text = message(caught.value, "training task a, step 1", "zero.offload=true")
        assert text.startswith("rank 3 ran out of memory while training task a, step 1")
        assert f" of {total:.1f} GiB free; try in this order: train.micro" in text
        assert "zero.offload=false" in text
    assert "1024.0 TiB asked for" in message(caught.value, "x") or "1.00 PiB" in str(caught.value)
    assert message(MemoryError(), "tokenising the data").startswith(
        "rank 3 ran out of memory while tokenising the data: "
    )


def test_other_errors_are_let_through() -> None:
    for error in (RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("out of memory")):
        assert where_exhausted(error) is None
        with pytest.raises(type(error)), reporting_exhausted_memory(0, 1, recipe()):
            raise error
