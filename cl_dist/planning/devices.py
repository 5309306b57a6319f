"""What a rank trains on: figures of vendors' data sheets, one entry per device.

Peaks are dense ones, in FLOP/s; NVIDIA's sheets print twice as much, with sparsity. Links are bytes per second in one
direction, half of what the sheets call bidirectional. A node is the vendor's own eight-GPU system where there is one,
otherwise a common cloud machine. How much of a peak a run reaches is an assumption: `EFFICIENCY`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from cl_dist.config.words import did_you_mean, listed
from cl_dist.errors import BadInput

GB, TB = 10**9, 10**12
TFLOPS = 10**12
GIB = 2**30


@dataclass(frozen=True)
class Efficiency:
    """Assumed shares of the peaks that training reaches, and assumed delays."""

    arithmetic: float = 0.5
    """Of the matrix peak, over a whole step with its element-wise operations."""
    memory: float = 0.8
    """Of the memory bandwidth, in the optimiser and in kernels that only read and write."""
    link: float = 0.7
    """Of the links within and between nodes."""
    pcie: float = 0.8
    """Of PCIe, with pinned memory."""
    host: float = 0.5
    """Of the host's memory bandwidth, in an optimiser on the CPU."""
    overlap: float = 0.8
    """Of communication that DeepSpeed overlaps with arithmetic: the share that really hides."""
    launch: float = 6e-6
    """Seconds that the CPU takes to launch an operation on a GPU; with few tokens, longer than the operation itself."""
    latency: float = 30e-6
    """Seconds that every collective takes in addition, however few ranks there are."""
    hop: float = 2e-6
    """Seconds from one rank to the next."""
    usable_memory: float = 0.92
    """Share of the device's memory that a run can use; the rest is CUDA's context, NCCL and fragmentation."""
    usable_host: float = 0.9
    """Share of the host's memory."""
    storage: float = 2e9
    """Bytes per second that the file system takes from a whole job."""


EFFICIENCY = Efficiency()


@dataclass(frozen=True)
class Device:
    """One kind of device, and the node that it usually sits in."""

    name: str
    title: str
    kind: Literal["cuda", "cpu"]
    memory: int
    """Bytes of one device; of a whole node for a CPU."""
    bfloat16: float | None
    """Peak of matrix products in bfloat16; None: the device has none."""
    tf32: float | None
    """Peak of float32 products that are rounded to TF32; None: the device has none."""
    float32: float
    bandwidth: float
    """Of the device's memory."""
    link: float
    """Between two devices of a node."""
    network: float
    """Of a node, to other nodes, over all its adapters."""
    pcie: float
    host_memory: int
    """Bytes of a node."""
    host_bandwidth: float
    """Of a node's CPU memory."""
    source: str
    """Where the device's figures are from."""
    node: str
    """The node, and where its figures are from."""

    def peak(self, dtype: str, tf32: bool = False) -> float:
        """Peak of matrix products in a recipe's `train.dtype`.

        Raises:
            BadInput: The device has no bfloat16.
        """
        if dtype == "bfloat16":
            if self.bfloat16 is None:
                raise BadInput(f"train.dtype: {self.title} has no bfloat16; allowed on it is float32")
            return self.bfloat16
        return self.tf32 if tf32 and self.tf32 is not None else self.float32


_HOPPER = {
    "kind": "cuda",
    "bfloat16": 989.4 * TFLOPS,
    "tf32": 494.7 * TFLOPS,
    "float32": 66.9 * TFLOPS,
    "link": 450 * GB,
    "network": 8 * 50 * GB,
    "pcie": 64 * GB,
    "host_memory": 2048 * GIB,
    "host_bandwidth": 2 * 307.2 * GB,
}
_AMPERE = {
    "kind": "cuda",
    "bfloat16": 312 * TFLOPS,
    "tf32": 156 * TFLOPS,
    "float32": 19.5 * TFLOPS,
    "link": 300 * GB,
    "network": 8 * 25 * GB,
    "pcie": 32 * GB,
    "host_bandwidth": 2 * 204.8 * GB,
}
_DEVICES = (
    Device(
        name="h200",
        title="NVIDIA H200 SXM",
        memory=141 * GB,
        bandwidth=4.8 * TB,
        source="NVIDIA H200 Tensor Core GPU Datasheet (141 GB, 4.8 TB/s, NVLink 900 GB/s, PCIe Gen5 128 GB/s)",
        node="DGX H200: 8 ConnectX-7 of 400 Gb/s, 2 TB of memory on two Xeon 8480C (NVIDIA DGX H200 Datasheet)",
        **_HOPPER,  # type: ignore[arg-type]
    ),
    Device(
        name="h100",
        title="NVIDIA H100 SXM",
        memory=80 * GB,
        bandwidth=3.35 * TB,
        source="NVIDIA H100 Tensor Core GPU Datasheet (80 GB, 3.35 TB/s, NVLink 900 GB/s, PCIe Gen5 128 GB/s)",
        node="DGX H100: 8 ConnectX-7 of 400 Gb/s, 2 TB of memory on two Xeon 8480C (NVIDIA DGX H100 Datasheet)",
        **_HOPPER,  # type: ignore[arg-type]
    ),
    Device(
        name="a100-80",
        title="NVIDIA A100 SXM 80 GB",
        memory=80 * GB,
        bandwidth=2.039 * TB,
        host_memory=2048 * GIB,
        source="NVIDIA A100 Tensor Core GPU Datasheet (80 GB, 2,039 GB/s, NVLink 600 GB/s, PCIe Gen4 64 GB/s)",
        node="DGX A100 640 GB: 8 ConnectX-6 of 200 Gb/s, 2 TB of memory on two EPYC 7742 (NVIDIA DGX A100 Datasheet)",
        **_AMPERE,  # type: ignore[arg-type]
    ),
    Device(
        name="a100-40",
        title="NVIDIA A100 SXM 40 GB",
        memory=40 * GB,
        bandwidth=1.555 * TB,
        host_memory=1024 * GIB,
        source="NVIDIA A100 Tensor Core GPU Datasheet (40 GB, 1,555 GB/s, NVLink 600 GB/s, PCIe Gen4 64 GB/s)",
        node="DGX A100 320 GB: 8 ConnectX-6 of 200 Gb/s, 1 TB of memory on two EPYC 7742 (NVIDIA DGX A100 Datasheet)",
        **_AMPERE,  # type: ignore[arg-type]
    ),
    Device(
        name="l40s",
        title="NVIDIA L40S",
        kind="cuda",
        memory=48 * GB,
        bfloat16=362.05 * TFLOPS,
        tf32=183 * TFLOPS,
        float32=91.6 * TFLOPS,
        bandwidth=864 * GB,
        link=32 * GB,
        network=50 * GB,
        pcie=32 * GB,
        host_memory=1536 * GIB,
        host_bandwidth=2 * 204.8 * GB,
        source="NVIDIA L40S GPU Datasheet (48 GB, 864 GB/s, PCIe Gen4 64 GB/s, no NVLink)",
        node="AWS g6e.48xlarge: 400 Gb/s, 1,536 GiB of memory (Amazon EC2 G6e instances)",
    ),
    Device(
        name="a10g",
        title="NVIDIA A10G",
        kind="cuda",
        memory=24 * GB,
        bfloat16=70 * TFLOPS,
        tf32=35 * TFLOPS,
        float32=31.52 * TFLOPS,
        bandwidth=600 * GB,
        link=32 * GB,
        network=12.5 * GB,
        pcie=32 * GB,
        host_memory=768 * GIB,
        host_bandwidth=2 * 204.8 * GB,
        source="NVIDIA A10G Datasheet for AWS (24 GB, 600 GB/s, PCIe Gen4 64 GB/s, 9,216 cores at 1.71 GHz)",
        node="AWS g5.48xlarge: 100 Gb/s, 768 GiB of memory (Amazon EC2 G5 instances)",
    ),
    Device(
        name="v100",
        title="NVIDIA V100 SXM2 32 GB",
        kind="cuda",
        memory=32 * GB,
        bfloat16=None,
        tf32=None,
        float32=15.7 * TFLOPS,
        bandwidth=900 * GB,
        link=150 * GB,
        network=4 * 12.5 * GB,
        pcie=16 * GB,
        host_memory=512 * GIB,
        host_bandwidth=2 * 76.8 * GB,
        source="NVIDIA V100 Tensor Core GPU Datasheet (32 GB, 900 GB/s, NVLink 300 GB/s, PCIe Gen3 32 GB/s)",
        node="DGX-1: 4 InfiniBand EDR of 100 Gb/s, 512 GB of memory on two Xeon E5-2698 v4 (NVIDIA DGX-1 Datasheet)",
    ),
)
NAMES = (*(device.name for device in _DEVICES), "cpu")
ALIASES = {"a100": "a100-80"}
"""Shorter names; the plan shows the device's title."""

CPU_CORE_FLOPS = 30e9
"""Assumed float32 FLOP/s of a core that a matrix product reaches (AVX2: 2 x 8 fused multiply-adds at 2 GHz, halved
once)."""
CPU_BFLOAT16 = 0.5
"""Assumed speed of bfloat16 relative to float32 on cores without instructions for it."""
CPU_BANDWIDTH = 20e9
"""Assumed memory bandwidth of a machine with one memory channel in use."""
CPU_NETWORK = 125e6
"""1 Gb/s, assumed between machines without a fast network."""


def find_device(name: str) -> Device:
    """The device of that name; `cpu` is this machine, or one like it.

    Raises:
        BadInput: There is none.
    """
    wanted = ALIASES.get(name.lower(), name.lower())
    if wanted == "cpu":
        return _this_machine()
    found = next((device for device in _DEVICES if device.name == wanted), None)
    if found is None:
        raise BadInput(
            f"--device: there is no {name!r}; allowed: {listed(NAMES, last='or')}{did_you_mean(name, NAMES)}"
        )
    return found


def _this_machine() -> Device:
    """A node with the cores and the memory of this machine. Its speeds are assumptions."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    peak = cores * CPU_CORE_FLOPS / EFFICIENCY.arithmetic
    return Device(
        name="cpu",
        title=f"CPU ({cores} cores)",
        kind="cpu",
        memory=memory,
        bfloat16=peak * CPU_BFLOAT16,
        tf32=None,
        float32=peak,
        bandwidth=CPU_BANDWIDTH,
        link=CPU_BANDWIDTH / 4,
        network=CPU_NETWORK,
        pcie=CPU_BANDWIDTH,
        host_memory=memory,
        host_bandwidth=CPU_BANDWIDTH,
        source="cores and memory of the machine that plans; its speeds are assumed, not measured",
        node="machines like this one, 1 Gb/s apart (assumed)",
    )
