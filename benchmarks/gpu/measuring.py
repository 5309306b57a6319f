"""A part's side: measures one thing after another and writes each result to the part's JSON at once.

A measurement that raises becomes an entry that says so, and the part goes on. One that hangs ends the process after
`ENTRY_SECONDS`, and one that crashes ends it by itself; `day.py` then notes which one it was and starts the part again,
which skips everything that is already in its JSON.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from cl_dist.launch.child import signal_when_parent_dies
from cl_dist.state.atomic import finite

if TYPE_CHECKING:
    import torch

ENTRY_SECONDS = 90.0
CPU_MODE = "CPU mode: tiny sizes, no GPU was used; these numbers say nothing about a GPU"
GPU_MODE = "GPU"
RUNNING, DONE, SKIPPED = "running", "done", "skipped"
NO_GPU, OTHER_DEVICE = 3, 4
"""Exit codes of a part's process that no other part would do better with."""
DEVICE_BROKEN = 5
"""Exit code after an error that leaves the process's CUDA context unusable."""

Size = TypeVar("Size")


class Record:
    """The measurements of a part.

    Args:
        path: The part's JSON. Measurements that are already in it are kept.
        about: Name of the part, device and so on; the first keys of the JSON.
        tiny: Whether to use tiny sizes, which a CPU can cope with.
        entry_seconds: A single measurement that takes longer hangs, and ends the process.
    """

    def __init__(self, path: Path, about: dict[str, Any], tiny: bool, entry_seconds: float = ENTRY_SECONDS) -> None:
        self.tiny, self._path, self._entry_seconds = tiny, path, entry_seconds
        earlier = read_part(path) or {}
        self.content: dict[str, Any] = {
            **about,
            "status": RUNNING,
            "reason": None,
            "measuring": None,
            "measurements": earlier.get("measurements", {}),
        }
        self.write()

    def size(self, on_gpu: Size, in_cpu_mode: Size) -> Size:
        """The size for the device at hand."""
        return in_cpu_mode if self.tiny else on_gpu

    def measure(self, name: str, work: Callable[[], Any]) -> None:
        """Add what `work` returns (JSON) under a name, unless it is there already."""
        if name in self.content["measurements"]:
            return
        self.content["measuring"] = name
        self.write()
        faulthandler.dump_traceback_later(self._entry_seconds, exit=True)
        began = time.monotonic()
        broken = False
        try:
            found = work()
        except ModuleNotFoundError as error:
            found = {"skipped": not_installed(error)}
        except Exception as error:
            found, broken = {"failed": f"{type(error).__name__}: {first_lines(str(error))}"}, _breaks_the_device(error)
        finally:
            faulthandler.cancel_dump_traceback_later()
        self.put(name, {**found, "took_seconds": round(time.monotonic() - began, 3)})
        if broken:
            os._exit(DEVICE_BROKEN)  # every later call would fail too; the next process continues after this entry
        _free_memory()

    def put(self, name: str, found: dict[str, Any]) -> None:
        """Add a result under a name."""
        self.content["measurements"][name] = found
        self.content["measuring"] = None
        self.write()

    def end(self, status: str, reason: str | None = None) -> None:
        """Write how the part ended."""
        self.content.update(status=status, reason=reason, measuring=None)
        self.write()

    def write(self) -> None:
        """Replace the part's JSON, atomically."""
        replace_json(self._path, self.content)


def read_part(path: Path) -> dict[str, Any] | None:
    """The content of a part's JSON; None if there is none."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return found


def replace_json(path: Path, content: Any) -> None:
    """Replace a JSON file by one rename; NaN and infinity become null.

    It is not flushed to disk as a run's state is: that would take a good part of the day, and a power loss costs no
    more than measuring again.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(finite(content), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    temporary.replace(path)


def not_installed(error: ModuleNotFoundError) -> str:
    """Why something is skipped. An unknown module of our own is a bug, not a missing package."""
    if (error.name or "").split(".")[0] == "cl_dist":
        raise error
    return f"not installed: {error.name}"


def first_lines(text: str) -> str:
    """The beginning of an error's text on one line."""
    return " ".join(text.split())[:400]


def _breaks_the_device(error: Exception) -> bool:
    """Whether the error leaves the CUDA context unusable: an illegal address, say, but not a lack of memory."""
    import torch

    return "CUDA error" in str(error) and not isinstance(error, torch.OutOfMemoryError)


def _free_memory() -> None:
    """Return what earlier measurements left to the GPU if it gets scarce; collecting takes a tenth of a second."""
    import torch

    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()
        if free < whole / 2:
            gc.collect()
            torch.cuda.empty_cache()


def program() -> None:
    """Entry point of a part's process; the task is the only argument."""
    signal_when_parent_dies(9)
    task = Namespace(**json.loads(sys.argv[1]))
    path = Path(task.out) / f"{task.part}.json"
    about: dict[str, Any] = {"part": task.part, "mode": None, "device": None}
    try:
        import torch
    except ModuleNotFoundError as error:
        Record(path, about, tiny=True).end(SKIPPED, not_installed(error))
        return
    device = _device(task.device)
    about.update(_described(device))
    _refuse_other_device(Path(task.out), about)
    record = Record(path, about, device.type == "cpu", task.entry_seconds)
    torch.manual_seed(0)
    try:
        module, _, function = task.function.partition(":")
        getattr(import_module(module), function)(record, device)
    except ModuleNotFoundError as error:
        record.end(SKIPPED, not_installed(error))
    else:
        record.end(DONE)


def _device(wanted: str) -> torch.device:
    import torch

    if torch.cuda.is_available() and wanted != "cpu":
        return torch.device("cuda", 0)
    if wanted == "cuda":
        print(f"PyTorch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU here")
        sys.exit(NO_GPU)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for processes that the part starts
    os.environ["DS_ACCELERATOR"] = "cpu"
    return torch.device("cpu")


def _described(device: torch.device) -> dict[str, Any]:
    import torch

    from cl_dist.benchmarks.limits import machine

    found = machine(device)
    on_gpu = device.type == "cuda"
    return {
        "mode": GPU_MODE if on_gpu else CPU_MODE,
        "device": torch.cuda.get_device_name(device) if on_gpu else found["cpu"],
        "machine": found,
        "measured_at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }


def _refuse_other_device(folder: Path, about: dict[str, Any]) -> None:
    """Exit if the folder has measurements of another device: a table of two devices would compare the wrong things."""
    for path in sorted(folder.glob("*.json")):
        other = read_part(path) or {}
        if other.get("mode") is not None and (other["mode"], other["device"]) != (about["mode"], about["device"]):
            print(f"it holds measurements of {other['device']}, and this is {about['device']}")
            sys.exit(OTHER_DEVICE)
