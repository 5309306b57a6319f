"""Turns running out of memory into one sentence: on which rank, while doing what, and what to change in the recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cl_dist.config.schema import Recipe
from cl_dist.config.words import listed
from cl_dist.errors import ClDistError
from cl_dist.heartbeat import last_beat

GIB = 2**30
_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": GIB, "TiB": 2**40}
_GPU_SIGNS = (
    "cuda out of memory",
    "hip out of memory",
    "cuda error: out of memory",
    "cuda driver error: out of memory",  # PyTorch's allocator with expandable segments
    "hip error: out of memory",
    "triton error [cuda]: out of memory",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, and cuSOLVER's and cuSPARSE's
    "'out of memory'",  # NCCL: Cuda failure 2 'out of memory'
    "failed to cuda calloc",  # NCCL
    "failed to cuda malloc",  # NCCL
)
_HOST_SIGNS = ("defaultcpuallocator: can't allocate memory", "cannot allocate memory", "not enough memory: you tried")
"""All compared in lower case. Neither these errors nor NCCL's have a class of their own."""
_WASTED = 0.1
"""Share of a GPU that PyTorch holds without using it, above which fragmentation is the likely cause."""


def where_exhausted(error: BaseException) -> str | None:
    """Which memory an error says is exhausted, `GPU memory` or `memory`; None if it says no such thing."""
    text = str(error).lower()
    if isinstance(error, torch.OutOfMemoryError):
        return "memory" if "defaultcpuallocator" in text else "GPU memory"
    if isinstance(error, MemoryError):
        return "memory"
    if not isinstance(error, RuntimeError | OSError):
        return None
    if any(sign in text for sign in _GPU_SIGNS):
        return "GPU memory"
    return "memory" if any(sign in text for sign in _HOST_SIGNS) else None


@contextmanager
def reporting_exhausted_memory(rank: int, world: int, recipe: Recipe) -> Iterator[None]:
    """Raise ClDistError in place of any library's out-of-memory error inside the block."""
    try:
        yield
    except Exception as error:
        kind = where_exhausted(error)
        if kind is None:
            raise
        phase = last_beat().phase
        sizes = _sizes(str(error), kind)
        advice = "; ".join(_advice(str(error), phase, recipe, world, on_gpu=kind == "GPU memory"))
        raise ClDistError(f"rank {rank} ran out of {kind} while {phase}{sizes}; try in this order: {advice}") from error


def _sizes(text: str, kind: str) -> str:
    """`: 2.0 GiB asked for, 1.2 GiB of 79.1 GiB free`, as far as the error or the machine says so."""
    asked = _bytes(r"[Tt]ried to allocate (\d[\d.]*) (\w+)", text) or _bytes(
        r"Unable to allocate (\d[\d.]*) (\w+)", text
    )
    free, total = _bytes(r"of which (\d[\d.]*) (\w+) is free", text), _bytes(r"capacity of (\d[\d.]*) (\w+)", text)
    if free is None and kind == "memory":
        free, total = _host_memory()
    parts = [] if asked is None else [f"{_shown(asked)} asked for"]
    if free is not None and total is not None:
        parts.append(f"{_shown(free)} of {_shown(total)} free")
    return f": {', '.join(parts)}" if parts else ""


def _advice(text: str, phase: str, recipe: Recipe, world: int, on_gpu: bool) -> Iterator[str]:
    """What to change, the cheapest first. The global batch stays the same."""
    zero = recipe.zero
    wasted, total = _bytes(r"and (\d[\d.]*) (\w+) is reserved", text), _bytes(r"capacity of (\d[\d.]*) (\w+)", text)
    if wasted is not None and total is not None and wasted > _WASTED * total:
        yield f"PYTORCH_ALLOC_CONF=expandable_segments:True in the environment ({_shown(wasted)} are held but unused)"
    yield from _smaller_batches(phase, recipe)
    if zero.stage < 3 and world > 1:
        stages = listed([str(stage) for stage in range(zero.stage + 1, 4)], last="or")
        yield f"zero.stage={stages}"
    if on_gpu and zero.stage > 0 and not zero.offload:
        yield "zero.offload=true"
    if not on_gpu and zero.offload:
        yield "zero.offload=false"
    yield "more ranks or nodes" if zero.stage > 0 else "zero.stage=1 on more ranks"
    if phase.startswith(("training", "evaluating", "measuring", "recording")):
        yield f"a shorter train.max_length (now {recipe.train.max_length}; in a new run)"
    elif recipe.model.lora is None:
        yield "model.lora (in a new run)"


def _smaller_batches(phase: str, recipe: Recipe) -> Iterator[str]:
    """What makes the activations of the current phase smaller without changing results."""
    train = recipe.train
    if phase.startswith("general ability") and recipe.eval.general is not None:
        size = recipe.eval.general.batch_size or recipe.eval.batch_size
        if size > 1:
            yield f"eval.general.batch_size={size // 2}"
    elif phase.startswith("evaluating") and recipe.eval.batch_size > 1:
        yield f"eval.batch_size={recipe.eval.batch_size // 2}"
    elif phase.startswith(("training", "measuring", "recording")):
        if (factor := _least_factor(train.micro_batch_size)) > 1:
            yield (
                f"train.micro_batch_size={train.micro_batch_size // factor} with "
                f"train.gradient_accumulation={train.gradient_accumulation * factor} (the same global batch)"
            )
        if not train.activation_checkpointing:
            yield "train.activation_checkpointing=true (in a new run)"


def _least_factor(number: int) -> int:
    """The smallest prime factor; 1 for 1."""
    return next((factor for factor in range(2, number + 1) if number % factor == 0), 1)


def _bytes(pattern: str, text: str) -> float | None:
    match = re.search(pattern, text)
    if match is None:
        return None
    number, unit = match[1].rstrip("."), match[2]
    return float(number) * _UNITS[unit] if unit in _UNITS else None


def _shown(size: float) -> str:
    unit = next((unit for unit in ("TiB", "GiB", "MiB") if size >= _UNITS[unit]), "KiB")
    return f"{size / _UNITS[unit]:.1f} {unit}"


def _host_memory() -> tuple[int | None, int | None]:
    """This machine's free and total memory in bytes; None if it does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None, None
    found = {name: int(kib) * 1024 for name, kib in re.findall(r"(\w+):\s+(\d+) kB", text)}
    return found.get("MemAvailable"), found.get("MemTotal")
