"""A stand-in for NVIDIA's driver library: answers what the hardware of a test would answer, and nothing else.

The texts are those of CUDA's driver API. A process finds the library through `machine.DRIVER_LIBRARY` or
LD_LIBRARY_PATH, and takes the answers from the environment (`answers`).
"""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

SOURCE = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
static int number(const char *name, int otherwise) { char *text = getenv(name); return text ? atoi(text) : otherwise; }
int cuInit(unsigned flags) { (void)flags; return number("STUB_INIT", 0); }
int cuDriverGetVersion(int *version) { *version = number("STUB_CUDA", 13000); return 0; }
int cuDeviceGetCount(int *count) { *count = number("STUB_GPUS", 1); return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
    (void)device;
    char *text = getenv("STUB_NAME");
    snprintf(name, size, "%s", text ? text : "NVIDIA H100 80GB HBM3");
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { (void)device; *bytes = 85029158912ull; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    (void)device;
    int capability = number("STUB_CAPABILITY", 90);
    *value = attribute == 75 ? capability / 10 : capability % 10;
    return 0;
}
int cuGetErrorString(int error, const char **text) {
    switch (error) {
    case 100: *text = "no CUDA-capable device is detected"; return 0;
    case 101: *text = "invalid device ordinal"; return 0;
    case 802: *text = "system not yet initialized"; return 0;
    case 803: *text = "system has unsupported display driver / cuda driver combination"; return 0;
    case 804: *text = "forward compatibility was attempted on non supported HW"; return 0;
    case 999: *text = "unknown error"; return 0;
    }
    *text = NULL;
    return 1;
}
"""


@cache
def driver_folder() -> Path:
    """A folder with the library, as libcuda.so.1."""
    folder = Path(mkdtemp(prefix="driver-"))
    source = folder / "driver.c"
    source.write_text(SOURCE, encoding="utf-8")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True)
    return folder


def answers(
    gpus: int = 1, cuda: int = 13000, init: int = 0, capability: int = 90, name: str = "NVIDIA H100 80GB HBM3"
) -> dict[str, str]:
    """The variables that make the library answer so: cuDeviceGetCount, cuDriverGetVersion, cuInit's error code, the
    compute capability times ten, and cuDeviceGetName.
    """
    return {
        "STUB_GPUS": str(gpus),
        "STUB_CUDA": str(cuda),
        "STUB_INIT": str(init),
        "STUB_CAPABILITY": str(capability),
        "STUB_NAME": name,
    }
