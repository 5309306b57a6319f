"""Which device this rank computes on: decided once, from `launch.device`, before the ranks meet.

A GPU that cannot be used must not turn into days of training on a CPU that nobody wanted, so the reason is always
found out. `cl_dist.machine` knows what can be known without torch; the rest is here.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch

from cl_dist.errors import BadInput
from cl_dist.machine import INSTALLATION, Device, DeviceSetting, Gpus, cpu_device, find_gpus

REFUSAL_SECONDS = 10.0
"""How long rank 0, which holds the ranks' meeting point, waits for the others to read why they are refused."""


@dataclass(frozen=True)
class Choice:
    """The device of this rank."""

    device: Device
    notice: str | None = None
    """Why a GPU of this machine is not used; None if there is none, or if `launch.device` is cpu."""


_on_gpu: bool | None = None
"""Whether this process computes on a GPU; None before `choose_device`."""


def uses_gpu() -> bool:
    """Whether this process computes on a GPU; the only place to ask."""
    return torch.cuda.is_available() if _on_gpu is None else _on_gpu


def device() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device("cuda", torch.cuda.current_device()) if uses_gpu() else torch.device("cpu")


def follow_device(of_model: torch.device) -> None:
    """Compute where a script of somebody else's has put its model, instead of choosing a device."""
    global _on_gpu
    _on_gpu = of_model.type == "cuda"


def choose_device(setting: DeviceSetting) -> Choice:
    """Decide what this rank computes on, and make it torch's current device.

    Raises:
        BadInput: `launch.device` is cuda and this rank has no GPU that can be used, or there are more ranks on this
            machine than GPUs.
    """
    global _on_gpu
    own = int(os.environ.get("LOCAL_RANK", "0"))
    gpus = Gpus() if setting == "cpu" else find_usable_gpus(own)
    if gpus.problem is not None and setting == "cuda":
        raise BadInput(f"launch.device: cuda: {gpus.problem}")
    _on_gpu = bool(gpus.devices) and gpus.problem is None
    if _on_gpu:
        _check_own_gpu(own, len(gpus.devices))
        torch.cuda.set_device(own)
        return Choice(gpus.devices[own])
    # For libraries that decide by themselves.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return Choice(cpu_device(), gpus.problem if gpus.present else None)


def set_matmul_precision(tf32: bool) -> None:
    """Apply `train.tf32`: whether GPUs multiply float32 matrices in TF32.

    PyTorch has two interfaces for this. After this older setter both can be read, also where torch.compile reads the
    older one; after the newer setter (`fp32_precision`) it fails there.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")


def find_usable_gpus(own: int | None = None) -> Gpus:
    """This machine's GPUs, after torch has been asked too, which may know a problem that the driver does not.

    `own`: the only GPU that torch needs code for; None: it needs code for all.
    """
    gpus = find_gpus(os.environ)
    if gpus.problem is not None:
        return gpus
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        said = " ".join(str(caught[-1].message).split()) if caught else "torch.cuda.is_available() is False"
        return replace(gpus, problem=f"torch {torch.__version__} cannot use it: {said}")
    if torch.version.hip is not None:
        gpus = replace(gpus, devices=tuple(map(_amd_gpu, range(torch.cuda.device_count()))), present=True)
        return gpus
    architectures = torch.cuda.get_arch_list()
    needed = gpus.devices if own is None else gpus.devices[own : own + 1]
    problems = (unsupported(gpu, architectures) for gpu in needed)
    return replace(gpus, problem=next(filter(None, problems), None))


def unsupported(gpu: Device, architectures: list[str]) -> str | None:
    """Why torch has no code for a GPU; None if it has.

    Args:
        gpu: The GPU.
        architectures: What torch was compiled for (`torch.cuda.get_arch_list()`), such as `sm_90` or `compute_90`.
            Machine code (sm) runs on GPUs of the same major and at least the same minor version, unless its name ends
            in a letter; intermediate code (compute) on all later GPUs.
    """
    major, minor = map(int, str(gpu.compute_capability).split("."))
    for name in architectures:
        kind, _, number = name.partition("_")
        exact = not number.isdecimal()
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")
        if not digits.isdecimal():
            continue
        built = (int(digits[:-1]), int(digits[-1]))
        if exact and built == (major, minor):
            return None
        if not exact and kind == "sm" and built[0] == major and built[1] <= minor:
            return None
        if not exact and kind == "compute" and built <= (major, minor):
            return None
    if not architectures:
        return None
    return (
        f"the installed torch {torch.__version__} has no code for {gpu.name}, whose compute capability is "
        f"{gpu.compute_capability} (it has {', '.join(architectures)}); install a build of torch that supports it "
        f"({INSTALLATION})"
    )


def _check_own_gpu(own: int, gpus: int) -> None:
    if own >= gpus:
        raise BadInput(
            f"launch.processes: rank {own} of this machine has no GPU to itself, there are {gpus}; use at most {gpus} "
            "ranks, or any number on the CPU with launch.device: cpu"
        )


def _amd_gpu(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(
        kind="cuda",
        name=properties.name,
        memory_bytes=properties.total_memory,
        bfloat16=torch.cuda.is_bf16_supported(),
        compute_capability=f"{properties.major}.{properties.minor}",
    )


def agree_on_devices(store: Any, rank: int, world: int, choice: Choice, timeout: timedelta) -> Device:
    """Refuse a job in which some ranks compute on GPUs and others on CPUs (collective, before the ranks' first one).

    They would wait for each other in different backends until their timeout. Each rank only counts, because reading
    what all others chose takes `world * world` messages; only a refusal reads them.

    Args:
        store: The store where the ranks meet.
        rank: This process's rank.
        world: Number of ranks.
        choice: What this rank computes on.
        timeout: How long to wait for the other ranks.

    Returns:
        On rank 0 the devices of all ranks in one record, on the others their own.

    Raises:
        BadInput: The ranks have devices of different kinds; on all ranks alike.
    """
    store.set(f"device/{rank}", json.dumps([choice.device.to_dict(), choice.notice]))
    store.add(f"devices/{choice.device.kind}", 1)
    if store.add("devices/named", 1) == world:
        store.set("devices/complete", "")
    store.wait(["devices/complete"], timeout)
    on_gpus = store.add("devices/cuda", 0)
    if on_gpus in (0, world):
        return choice.device if rank > 0 else _shared([_chosen(store, other)[0] for other in range(world)])
    chosen = [_chosen(store, other) for other in range(world)]
    store.add("devices/refused", 1)
    deadline = time.monotonic() + REFUSAL_SECONDS
    while rank == 0 and store.add("devices/refused", 0) < world and time.monotonic() < deadline:
        time.sleep(0.05)
    first, notice = next((number, notice) for number, (each, notice) in enumerate(chosen) if each.kind == "cpu")
    raise BadInput(
        f"launch.device: {on_gpus} of {world} ranks compute on GPUs, the others on CPUs, first rank {first}: "
        f"{notice or 'it sees no GPU'}"
    )


def _chosen(store: Any, rank: int) -> tuple[Device, str | None]:
    device, notice = json.loads(store.get(f"device/{rank}"))
    return Device(**device), notice


def _shared(chosen: Sequence[Device]) -> Device:
    """One record for all ranks' devices: what they have in common, and the least memory of any."""
    names = " and ".join(dict.fromkeys(each.name for each in chosen))
    least = min(chosen, key=lambda each: each.memory_bytes)
    return replace(least, name=names, bfloat16=all(each.bfloat16 for each in chosen))
