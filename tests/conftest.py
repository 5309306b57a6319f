"""What every test runs under, set before anything imports torch or transformers; which worker runs which tests, and
what is printed meanwhile."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import configuration, settings

from tests.zygote import Zygote, shared

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

# Nothing is left in the repository, and a test does not depend on what an earlier run has found. In CI
# (SAME_EXAMPLES) every run tries the same examples, so that a change is judged by what it changes; elsewhere every run
# looks further.
configuration.set_hypothesis_home_dir(Path(tempfile.gettempdir(), "cl_dist-hypothesis"))
settings.register_profile("cl_dist", database=None, deadline=None, derandomize="SAME_EXAMPLES" in os.environ)
settings.load_profile("cl_dist")


@pytest.fixture(scope="session")
def zygote() -> Zygote:
    """One parent process for all ranks of the session."""
    return shared()


TOGETHER = ("tests/sharding",)
"""Folders whose files share ranks, and therefore a worker."""
LONGEST = (
    "tests/runs/",
    "tests/distributed/",
    "tests/faults/",
    "tests/zoo/",
    "tests/coordinator/",
    "tests/sharding/",
    "tests/methods/",
    "tests/test_recipes.py",
    "tests/state/test_durability.py",
    "tests/models/test_sharded.py",
    "tests/benchmarks/",
    "tests/kernels/test_compiled.py",
)
"""Files and folders that take longest, in about this order: were they the last ones, one worker would end minutes after
the others."""
SHOWN_LINES = 60
"""Lines of a failure that are printed at once; all of them are printed at the end."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files stay together, as with `--dist loadfile`, and the longest ones come first."""
    from xdist.scheduler import LoadFileScheduling

    class LongestFirst(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), file)

    return LongestFirst(config, log) if config.getvalue("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Move the longest files to the front."""

    def place(item: pytest.Item) -> int:
        return next((n for n, path in enumerate(LONGEST) if item.nodeid.startswith(path)), len(LONGEST))

    items.sort(key=place)


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Print failures when they happen, in the process that prints."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(FailuresAtOnce(reporter))


class FailuresAtOnce:
    """Prints the end of each failure's traceback as soon as a worker reports it."""

    def __init__(self, reporter: Any) -> None:
        self._reporter = reporter

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Print a failed report."""
        if report.failed:
            self._reporter.ensure_newline()
            self._reporter.section(f"{report.nodeid} ({report.when})", sep="_", red=True)
            self._reporter.write_line("\n".join(report.longreprtext.splitlines()[-SHOWN_LINES:]))
