"""What this machine computes with: its GPUs, why they cannot be used if they cannot, and its CPU.

Nothing here imports torch, so a launcher finds out within milliseconds. The GPUs are asked through the CUDA driver's
own library, as torch does later: it respects CUDA_VISIBLE_DEVICES, and its error codes say what is wrong with a driver.
Sources: the CUDA driver API (cuInit, cuDriverGetVersion, cuDeviceGetAttribute); the CUDA compatibility guide (a driver
runs any minor release of the CUDA release that it was made for, but no later major one).
"""

from __future__ import annotations

import ast
import ctypes
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from cl_dist.errors import BadInput

DeviceSetting = Literal["auto", "cuda", "cpu"]
"""Values of `launch.device`."""

DEVICE_FILES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""One of these exists if a CUDA or ROCm driver is loaded (the last one in WSL)."""
DRIVER_LIBRARY = "libcuda.so.1"
DRIVER_VERSION = Path("/proc/driver/nvidia/version")
PCI_DEVICES = Path("/sys/bus/pci/devices")
OLDEST_DRIVERS = {11: "450", 12: "525", 13: "580"}
"""The first release of NVIDIA's driver for Linux that runs a major release of CUDA."""
INSTALLATION = "docs/gpu.md"
"""Where the installation on GPUs is explained."""

_NVIDIA, _DISPLAY = "0x10de", "0x03"
"""A PCI vendor, and the start of the class of everything that could be a GPU."""
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""
_NO_DEVICE = 100
_ADVICE = {
    100: "see whether nvidia-smi lists any GPU",
    802: "start NVIDIA's Fabric Manager (systemctl start nvidia-fabricmanager), which GPUs with NVSwitch need",
    803: "the driver's kernel module and its libraries are of different releases: reboot the machine, or reinstall the "
    "driver",
    804: "remove the CUDA compatibility libraries from LD_LIBRARY_PATH, which this GPU does not support",
}
"""What to do, by error code of cuInit."""
_NO_SUCH_DEVICE = (100, 101)
"""Error codes of cuInit that CUDA_VISIBLE_DEVICES may be the reason for: it names no GPU, or one twice, say."""
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
"""In /proc/cpuinfo, on x86 and on ARM: multiplies bfloat16 without converting it first."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes on."""

    kind: Literal["cuda", "cpu"]
    name: str
    memory_bytes: int
    """Of the GPU, or of the whole machine."""
    bfloat16: bool
    """Whether it multiplies bfloat16 in hardware."""
    cores: int | None = None
    """CPU cores that this process may use; None for a GPU."""
    compute_capability: str | None = None
    """Such as `9.0`; None for a CPU."""
    driver: str | None = None
    """Release of NVIDIA's driver; None for a CPU, or if it is unknown."""
    cuda: str | None = None
    """Newest release of CUDA that the driver supports; None for a CPU."""

    def describe(self) -> str:
        """`NVIDIA H100 80GB HBM3 (79.6 GiB, compute capability 9.0, driver 580.82.07, CUDA 13.0)`."""
        facts = [f"{self.memory_bytes / 2**30:.1f} GiB"]
        if self.kind == "cpu":
            facts.insert(0, f"{self.cores} cores" if self.cores != 1 else "1 core")
            facts.append("bfloat16 instructions" if self.bfloat16 else "no bfloat16 instructions")
        else:
            facts.append(f"compute capability {self.compute_capability}")
            facts += [f"driver {self.driver}"] if self.driver else []
            facts += [f"CUDA {self.cuda}"] if self.cuda else []
        return f"{self.name} ({', '.join(facts)})"

    def to_dict(self) -> dict[str, Any]:
        """The facts that apply, for a JSON file."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Gpus:
    """The GPUs that this process could use."""

    devices: tuple[Device, ...] = ()
    """The visible ones, in CUDA's order."""
    problem: str | None = None
    """Why none can be used and how to change that, in one sentence; None if they can be."""
    present: bool = False
    """Whether the machine has any GPU, usable or not, as far as can be seen."""


@dataclass(frozen=True)
class TorchBuild:
    """What the installed torch was built for."""

    version: str
    cuda: str | None
    """Release of CUDA, such as `13.0`; None: not built for CUDA."""
    hip: str | None = None
    """Release of ROCm's HIP; None: not built for AMD's GPUs."""

    @staticmethod
    def read(path: Path) -> TorchBuild:
        """Read torch/version.py without importing torch."""
        values: dict[str, Any] = {}
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
            value = getattr(node, "value", None)
            if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
                values[target.id] = value.value
        return TorchBuild(str(values.get("__version__")), values.get("cuda"), values.get("hip"))


def installed_torch() -> TorchBuild | None:
    """The installed build of torch; None if there is none."""
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    return TorchBuild.read(Path(spec.origin).with_name("version.py"))


def find_gpus(environment: Mapping[str, str]) -> Gpus:
    """Find the GPUs that torch will see in a process with this environment, which must be that of this process.

    Finds everything that is known without torch. Whether torch has code for a GPU's compute capability is not
    (`cl_dist.engine.device`), and AMD's GPUs are left to torch.
    """
    build, present = installed_torch(), _has_gpu()
    if build is not None and build.hip is not None:
        return Gpus(present=present)
    hidden = environment.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        word = "empty" if not hidden.strip() else hidden.strip()
        return Gpus(problem=f"CUDA_VISIBLE_DEVICES is {word}, which hides every GPU; unset it", present=present)
    # Any other value is the driver's to judge: numbers, UUIDs, or words that it does not know.
    try:
        driver = ctypes.CDLL(DRIVER_LIBRARY)
    except OSError as error:
        return Gpus(problem=_without_driver(present, error), present=present)
    return _ask_driver(driver, build, present, hidden)


def _ask_driver(driver: ctypes.CDLL, build: TorchBuild | None, present: bool, visible: str | None) -> Gpus:
    supported = _cuda_version(driver)
    release = _driver_release()
    code = driver.cuInit(0)
    count = ctypes.c_int(0)
    if code == 0:
        code = driver.cuDeviceGetCount(ctypes.byref(count))
    found = tuple(_describe_gpu(driver, index, release, supported) for index in range(count.value))
    if build is not None and build.cuda is None and (found or present):
        what = f"{len(found)} × {found[0].name}" if found else "an NVIDIA GPU"
        problem = (
            f"this machine has {what}, but the installed torch {build.version} is a build for CPUs; install a build "
            f"for CUDA ({INSTALLATION})"
        )
        return Gpus(problem=problem, present=True)
    if build is not None and build.cuda is not None and supported is not None:
        needed = int(build.cuda.partition(".")[0])
        if needed > supported[0]:
            known = f"NVIDIA's driver{f' {release}' if release else ''} supports CUDA up to {_dotted(supported)}"
            least = f" (release {OLDEST_DRIVERS[needed]} or later)" if needed in OLDEST_DRIVERS else ""
            problem = (
                f"{known}, but the installed torch {build.version} needs CUDA {build.cuda}: update the driver{least}, "
                f"or install a build of torch for CUDA {supported[0]} ({INSTALLATION})"
            )
            return Gpus(problem=problem, present=present or bool(found))
    if code != 0 or not found:
        code = code or _NO_DEVICE
        advice = _ADVICE.get(code, "see whether nvidia-smi works and what dmesg reports, and reboot the machine")
        if visible is not None and code in _NO_SUCH_DEVICE:
            advice = f"CUDA_VISIBLE_DEVICES is {visible}: give GPUs that exist, each once, or unset it"
        problem = f"NVIDIA's driver finds no usable GPU: {_error_text(driver, code)} (error {code}); {advice}"
        return Gpus(problem=problem, present=present or code != _NO_DEVICE)
    return Gpus(found, present=True)


def _without_driver(present: bool, error: OSError) -> str:
    if not present:
        return "this machine has no NVIDIA GPU that can be seen from here; use one that has, or launch.device: cpu"
    return (
        f"this machine has a GPU, but NVIDIA's driver library cannot be loaded ({error}): install the driver, or start "
        "the container with the GPUs (docker run --gpus all, apptainer exec --nv)"
    )


def _has_gpu() -> bool:
    """Whether a driver's device file exists, or an NVIDIA GPU is on the PCI bus."""
    return any(Path(file).exists() for file in DEVICE_FILES) or any(map(_is_gpu, _entries(PCI_DEVICES)))


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:  # no PCI bus, or a sandbox that hides it
        return []


def _is_gpu(folder: Path) -> bool:
    try:
        vendor, kind = ((folder / name).read_text(encoding="ascii").strip() for name in ("vendor", "class"))
    except (OSError, ValueError):
        return False
    return vendor == _NVIDIA and kind.startswith(_DISPLAY)


def _cuda_version(driver: ctypes.CDLL) -> tuple[int, int] | None:
    """The newest CUDA release that the driver supports; cuInit need not have succeeded."""
    number = ctypes.c_int(0)
    if driver.cuDriverGetVersion(ctypes.byref(number)) != 0 or number.value <= 0:
        return None
    return number.value // 1000, number.value % 1000 // 10


def _driver_release() -> str | None:
    """The driver's release: 580.82.07 in `NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.82.07 ...`."""
    try:
        match = re.search(r"\b(\d{3,}\.\d+(?:\.\d+)?)\b", DRIVER_VERSION.read_text(encoding="utf-8"))
    except OSError:
        return None
    return match[1] if match else None


def _describe_gpu(driver: ctypes.CDLL, index: int, release: str | None, supported: tuple[int, int] | None) -> Device:
    handle = ctypes.c_int(0)
    driver.cuDeviceGet(ctypes.byref(handle), index)
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t(0)
    driver.cuDeviceGetName(name, len(name), handle)
    driver.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    capability = []
    for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR):
        value = ctypes.c_int(0)
        driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, handle)
        capability.append(value.value)
    return Device(
        kind="cuda",
        name=name.value.decode("utf-8", "replace"),
        memory_bytes=memory.value,
        bfloat16=capability[0] >= 8,
        compute_capability=_dotted(capability),
        driver=release,
        cuda=None if supported is None else _dotted(supported),
    )


def _error_text(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    if driver.cuGetErrorString(code, ctypes.byref(text)) != 0 or text.value is None:
        return "an unknown error"
    return text.value.decode("utf-8", "replace")


def _dotted(version: Any) -> str:
    return ".".join(map(str, version))


def cpu_device() -> Device:
    """This machine's CPU."""
    name, flags = "", set[str]()
    for line in _cpu_lines():
        key, _, value = line.partition(":")
        if key.strip() == "model name" and not name:
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        kind="cpu",
        name=name or platform.machine(),
        memory_bytes=memory,
        bfloat16=bool(flags & _BFLOAT16_FLAGS),
        cores=len(os.sched_getaffinity(0)),
    )


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def check_device(setting: DeviceSetting, environment: Mapping[str, str]) -> None:
    """Raise BadInput if `launch.device` is cuda and this machine's GPUs cannot be used."""
    if setting == "cuda" and (problem := find_gpus(environment).problem) is not None:
        raise BadInput(f"launch.device: cuda: {problem}")


def describe_devices(setting: DeviceSetting, environment: Mapping[str, str]) -> str:
    """What ranks on this machine will compute on, in a few words; an empty string if only torch knows."""
    if setting == "cpu":
        return "the CPU"
    build = installed_torch()
    if build is not None and build.hip is not None:
        return ""
    gpus = find_gpus(environment).devices
    if not gpus:
        return "the CPU"
    return gpus[0].name if len(gpus) == 1 else f"{len(gpus)} × {gpus[0].name}"


def count_ranks(setting: DeviceSetting, environment: Mapping[str, str]) -> int:
    """How many ranks `launch.processes: auto` starts on this machine: one per GPU, or one that uses all CPU cores.

    Raises BadInput if that is unknown without torch.
    """
    if setting == "cpu":
        return 1
    build = installed_torch()
    if build is not None and build.hip is not None:
        raise BadInput(
            f"launch.processes: auto counts NVIDIA's GPUs, but torch {build.version} is a build for AMD's; give a "
            "number of ranks"
        )
    return max(1, len(find_gpus(environment).devices))
