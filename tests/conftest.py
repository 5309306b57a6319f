"""What every test runs under; set before anything imports torch or transformers."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from hypothesis import configuration, settings

from tests.zygote import Zygote

GPU_DEVICES = (Path("/dev/nvidia0"), Path("/dev/kfd"))

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two ranks on two cores
if not any(device.exists() for device in GPU_DEVICES):
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Kernels are interpreted where they can't run. Read when a kernel's file is imported; a build of PyTorch without GPUs
# does not see one that is there.
if not any(device.exists() for device in GPU_DEVICES) or metadata.version("torch").endswith("+cpu"):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Caches of tokenised data, digests and converted models do not outlive the session, whose code may be new.
if "CL_DIST_CACHE" not in os.environ:
    os.environ["CL_DIST_CACHE"] = tempfile.mkdtemp(prefix="cl_dist-cache-")
    atexit.register(shutil.rmtree, os.environ["CL_DIST_CACHE"], ignore_errors=True)

# Nothing is left in the repository, and a test does not depend on what an earlier run has found.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), "cl_dist-hypothesis"))
settings.register_profile("cl_dist", database=None, deadline=None)
settings.load_profile("cl_dist")


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """One parent process for all runs of a file."""
    parent = Zygote()
    yield parent
    parent.close()
