"""Which device a rank computes on, and ranks that do not agree."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore  # type: ignore[attr-defined]

from cl_dist import machine
from cl_dist.engine import device as device_module
from cl_dist.engine.device import Choice, agree_on_devices, choose_device, unsupported, uses_gpu
from cl_dist.engine.distributed import Joined
from cl_dist.errors import BadInput
from cl_dist.machine import Device, TorchBuild, cpu_device
from tests.driver import answers, driver_folder

H100 = Device(kind="cuda", name="H100", memory_bytes=80 << 30, bfloat16=True, compute_capability="9.0")
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]
"""As in torch 2.13 for CUDA 13."""


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with two GPUs and a working driver; torch is the installed one."""
    for name, value in answers(gpus=2).items():
        monkeypatch.setenv(name, value)
    for name in ("DS_ACCELERATOR", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", str(driver_folder() / "libcuda.so.1"))
    monkeypatch.setattr(device_module, "_on_gpu", None)
    yield
    # `choose_device` sets these itself.
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")


needs_cpu_build = pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch could use the GPUs")


@needs_cpu_build
def test_a_cpu_build_of_torch_does_not_train_silently_on_the_cpu(gpu_machine: None) -> None:
    with pytest.raises(BadInput, match=r"^launch\.device: cuda: this machine has 2 × NVIDIA H100 .* build for CPUs"):
        choose_device("cuda")
    choice = choose_device("auto")
    assert not uses_gpu()
    assert (os.environ["DS_ACCELERATOR"], os.environ["CUDA_VISIBLE_DEVICES"]) == ("cpu", "")
    joined = Joined(0, 1, choice.device, choice.notice)
    assert joined.to_dict() == {**cpu_device().to_dict(), "notice": choice.notice}
    warning = joined.warning()
    assert warning is not None
    assert warning.startswith("WARNING: training on the CPU, although this machine has a GPU: this machine has 2 ×")
    assert joined.warning("scoring") == warning.replace("training", "scoring", 1)


def test_the_cpu_without_a_warning(gpu_machine: None) -> None:
    choice = choose_device("cpu")
    assert (choice.device, choice.notice, uses_gpu()) == (cpu_device(), None, False)
    assert Joined(0, 2, choice.device).describe().startswith("2 ranks on the CPU: ")


@needs_cpu_build
def test_torch_has_the_last_word(gpu_machine: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_torch", lambda: TorchBuild("2.13.0+cu130", "13.0"))
    with pytest.raises(BadInput, match=r"cuda: torch .* cannot use it: torch\.cuda\.is_available\(\) is False"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("capability", "architectures", "works"),
    [
        ("9.0", ARCHITECTURES, True),
        ("8.9", ARCHITECTURES, True),  # code of sm_86
        ("7.5", ARCHITECTURES, True),
        ("7.0", ARCHITECTURES, False),
        ("12.1", ARCHITECTURES, True),
        ("13.0", ARCHITECTURES, True),  # compiled by the driver from compute_120
        ("13.0", ARCHITECTURES[:-1], False),
        ("9.0", ["sm_80", "sm_90a"], True),
        ("10.3", ["sm_100a"], False),
    ],
)
def test_compute_capability(capability: str, architectures: list[str], works: bool) -> None:
    gpu = Device(kind="cuda", name="GPU", memory_bytes=1, bfloat16=True, compute_capability=capability)
    problem = unsupported(gpu, architectures)
    assert (problem is None) is works
    assert works or f"has no code for GPU, whose compute capability is {capability} (it has " in str(problem)


def agreed(choices: list[Choice]) -> list[Device | str]:
    """What each rank of a job with these devices gets: a device, or a refusal."""
    store = HashStore()

    def be(rank: int) -> Device | str:
        try:
            return agree_on_devices(store, rank, len(choices), choices[rank], timedelta(seconds=10))
        except BadInput as error:
            return str(error)

    with ThreadPoolExecutor(len(choices)) as pool:
        return list(pool.map(be, range(len(choices))))


def test_ranks_on_equal_devices_agree() -> None:
    assert agreed([Choice(cpu_device())] * 3) == [cpu_device()] * 3
    other = Device(kind="cuda", name="A100", memory_bytes=40 << 30, bfloat16=True, compute_capability="8.0")
    first, second = agreed([Choice(H100), Choice(other)])
    assert isinstance(first, Device)
    assert (first.name, first.memory_bytes) == ("H100 and A100", 40 << 30)
    assert Joined(0, 2, first).to_dict()["count"] == 2
    assert Joined(0, 2, first).describe().startswith("2 ranks on a GPU each: H100 and A100 (40.0 GiB, compute")
    assert second == other


def test_a_rank_whose_gpu_is_gone_is_refused_by_all() -> None:
    gone = Choice(cpu_device(), "NVIDIA's driver finds no usable GPU: no CUDA-capable device is detected (error 100)")
    refused = agreed([Choice(H100), Choice(H100), gone, Choice(H100)])
    assert set(refused) == {
        "launch.device: 3 of 4 ranks compute on GPUs, the others on CPUs, first rank 2: NVIDIA's driver finds no "
        "usable GPU: no CUDA-capable device is detected (error 100)"
    }
