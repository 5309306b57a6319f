"""What this machine computes with, with a driver library that answers what a machine's hardware would answer."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from cl_dist import machine
from cl_dist.errors import BadInput
from cl_dist.machine import TorchBuild, check_device, count_ranks, cpu_device, find_gpus
from tests.driver import answers, driver_folder

CUDA_13 = TorchBuild("2.13.0+cu130", "13.0")
VERSION_FILE = """\
from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip', 'rocm', 'xpu']
__version__ = '2.13.0+cu130'
debug = False
cuda: Optional[str] = '13.0'
git_version = 'cf30153c4c131c8164ee7798e5022d810682e2cb'
hip: Optional[str] = None
rocm: Optional[str] = None
xpu: Optional[str] = None
"""
"""As in the wheel."""
DRIVER_FILE = """\
NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07  Release Build  (dvs-builder@U22-I3-B17-02-5)
GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)
"""


@pytest.fixture
def hardware(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Sets what the driver answers (`answers`), and the installed torch."""
    version = tmp_path / "version"
    version.write_text(DRIVER_FILE)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "DRIVER_VERSION", version)

    def set_up(build: TorchBuild = CUDA_13, **answer: object) -> None:
        monkeypatch.setattr(machine, "DRIVER_LIBRARY", str(driver_folder() / "libcuda.so.1"))
        monkeypatch.setattr(machine, "installed_torch", lambda: build)
        for name, value in answers(**answer).items():  # type: ignore[arg-type]
            monkeypatch.setenv(name, value)

    return set_up


def test_usable_gpus_are_described(hardware: Callable[..., None]) -> None:
    hardware(gpus=2)
    gpus = find_gpus(os.environ)
    assert gpus.problem is None
    described = "NVIDIA H100 80GB HBM3 (79.2 GiB, compute capability 9.0, driver 580.82.07, CUDA 13.0)"
    assert [gpu.describe() for gpu in gpus.devices] == [described] * 2
    assert all(gpu.bfloat16 for gpu in gpus.devices)
    hardware(capability=75, name="Tesla T4")
    assert not find_gpus(os.environ).devices[0].bfloat16


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        (
            {"build": TorchBuild("2.13.0+cpu", None), "gpus": 2},
            "this machine has 2 × NVIDIA H100 80GB HBM3, but the installed torch 2.13.0+cpu is a build for CPUs; "
            "install a build for CUDA (docs/gpu.md)",
        ),
        (
            {"cuda": 12020},
            "NVIDIA's driver 580.82.07 supports CUDA up to 12.2, but the installed torch 2.13.0+cu130 needs CUDA 13.0: "
            "update the driver (release 580 or later), or install a build of torch for CUDA 12 (docs/gpu.md)",
        ),
        ({"init": 100}, "no CUDA-capable device is detected (error 100); see whether nvidia-smi lists any GPU"),
        ({"init": 802}, "system not yet initialized (error 802); start NVIDIA's Fabric Manager"),
        ({"init": 803}, "unsupported display driver / cuda driver combination (error 803); the driver's kernel module"),
        ({"init": 999}, "unknown error (error 999); see whether nvidia-smi works"),
        ({"init": 123}, "an unknown error (error 123)"),
        ({"gpus": 0}, "no CUDA-capable device is detected (error 100)"),
    ],
)
def test_a_gpu_that_cannot_be_used_says_why(
    hardware: Callable[..., None], setting: dict[str, object], expected: str
) -> None:
    hardware(**setting)
    problem = find_gpus(os.environ).problem
    assert problem is not None
    assert expected in problem
    with pytest.raises(BadInput, match=r"^launch\.device: cuda: "):
        check_device("cuda", os.environ)
    check_device("auto", os.environ)
    check_device("cpu", os.environ)
    assert count_ranks("auto", os.environ) == 1


def test_a_driver_runs_all_minor_releases_of_its_cuda(hardware: Callable[..., None]) -> None:
    hardware(TorchBuild("2.13.0+cu129", "12.9"), cuda=12020)
    assert find_gpus(os.environ).problem is None
    hardware(TorchBuild("2.13.0+cu126", "12.6"), cuda=13000)
    assert find_gpus(os.environ).problem is None


@pytest.mark.parametrize("hidden", ["", " ", "-1"])
def test_hidden_gpus(hardware: Callable[..., None], hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hardware()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    problem = find_gpus(os.environ).problem
    assert problem is not None
    assert problem.endswith("which hides every GPU; unset it")
    assert count_ranks("auto", os.environ) == 1


@pytest.mark.parametrize("visible", ["NoDevFiles", "7", "0,0", "-1,0", "GPU-11111111-2222-3333-4444-555555555555"])
def test_the_driver_judges_what_is_visible(
    hardware: Callable[..., None], visible: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hardware(init=100)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    problem = find_gpus(os.environ).problem
    assert problem is not None
    assert problem.endswith(f"CUDA_VISIBLE_DEVICES is {visible}: give GPUs that exist, each once, or unset it")
    hardware(init=0, gpus=1)
    assert (find_gpus(os.environ).problem, count_ranks("auto", os.environ)) == (None, 1)


def test_a_gpu_without_a_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", "libno-such-driver.so.1")
    monkeypatch.setattr(machine, "DEVICE_FILES", ())
    monkeypatch.setattr(machine, "PCI_DEVICES", tmp_path)
    gpus = find_gpus(os.environ)
    assert not gpus.present
    assert gpus.problem is not None
    assert gpus.problem.startswith("this machine has no NVIDIA GPU")
    for name, vendor, kind in (("0000:00:01.0", "0x1af4", "0x020000"), ("0000:17:00.0", "0x10de", "0x030200")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "class").write_text(f"{kind}\n")
    gpus = find_gpus(os.environ)
    assert gpus.present
    assert gpus.problem is not None
    assert gpus.problem.startswith("this machine has a GPU, but NVIDIA's driver library cannot be loaded (libno-such")


def test_one_rank_per_gpu(hardware: Callable[..., None]) -> None:
    hardware(gpus=8)
    assert count_ranks("auto", os.environ) == count_ranks("cuda", os.environ) == 8
    assert count_ranks("cpu", os.environ) == 1
    hardware(TorchBuild("2.13.0+rocm7.1", None, "7.1"))
    with pytest.raises(BadInput, match="give a number of ranks"):
        count_ranks("auto", os.environ)


def test_the_build_of_torch_is_read_without_importing_it(tmp_path: Path) -> None:
    (tmp_path / "version.py").write_text(VERSION_FILE)
    assert TorchBuild.read(tmp_path / "version.py") == CUDA_13
    import torch

    assert machine.installed_torch() == TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip)


@pytest.mark.parametrize(("flags", "has"), [("fpu avx2 avx512f", False), ("fpu avx512_bf16", True), ("amx_bf16", True)])
def test_the_cpu(monkeypatch: pytest.MonkeyPatch, flags: str, has: bool) -> None:
    lines = ["processor\t: 0", "model name\t: AMD EPYC 9654", f"flags\t\t: {flags}", "processor\t: 1"]
    monkeypatch.setattr(machine, "_cpu_lines", lambda: lines)
    cpu = cpu_device()
    assert (cpu.kind, cpu.name, cpu.bfloat16) == ("cpu", "AMD EPYC 9654", has)
    assert cpu.cores == len(os.sched_getaffinity(0))
    assert cpu.memory_bytes > 2**28
    assert ("no bfloat16 instructions" in cpu.describe()) is not has
