"""Named moments of a run at which a rank can be killed (SIGKILL, so nothing is cleaned up), and other disturbances."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from cl_dist.coordinator import scoring, stream
from cl_dist.engine.trainer import EngineProbe, TaskTrainer
from cl_dist.errors import BadInput
from cl_dist.evaluation.general import GeneralEvaluator
from cl_dist.evaluation.scorers import PromptScorer
from cl_dist.methods.kif import fusion, unit_method
from cl_dist.state import atomic, ledger, snapshot, spans
from cl_dist.state.atomic import LineFile
from cl_dist.state.checkpoints import Checkpoints, CheckpointSchedule
from cl_dist.state.lock import RunLock
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder


def arm(rank: int, moment: str, on_rank: int, count: int) -> None:
    """Kill this process at the `count`-th occurrence of `moment`, if it is rank `on_rank`."""
    if rank == on_rank:
        MOMENTS[moment](count)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_before(owner: Any, name: str, count: int) -> None:
    """Replace `owner.name` with a function that kills the process at its `count`-th call."""
    original, calls = getattr(owner, name), iter(range(1, 10**9))

    def dying(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == count:
            _die()
        return original(*args, **kwargs)

    setattr(owner, name, dying)


def _before_step(count: int) -> None:
    _kill_before(TaskTrainer, "step", count)


def _half_a_tensor_file(count: int) -> None:
    """Die with only half of a rank's tensor file on disk."""
    original, calls = spans.save_file, iter(range(1, 10**9))

    def dying(tensors: dict[str, Any], path: Path) -> None:
        original(tensors, path)
        if next(calls) == count:
            os.truncate(path, path.stat().st_size // 2)
            _die()

    spans.save_file = dying


def _before_publishing(count: int) -> None:
    """All files of the snapshot are written, but not published."""
    _kill_before(snapshot.atomic, "publish", count)


def _before_naming(count: int) -> None:
    """The snapshot is published, but not in the manifest yet."""
    _kill_before(Checkpoints, "add", count)


def _before_a_task(count: int) -> None:
    """The previous task is evaluated and saved."""
    _kill_before(stream.Coordinator, "_run_task", count)


def _in_evaluation(count: int) -> None:
    _kill_before(scoring, "write_predictions", count)


def _in_general_ability(count: int) -> None:
    """A task of the harness is about to be measured."""
    _kill_before(GeneralEvaluator, "evaluate", count)


def _in_export(count: int) -> None:
    """The model's files are being written."""
    _kill_before(stream, "export_model", count)


def _in_fusion(count: int) -> None:
    """Some of a rank's masters are fused, the others are not, and none is published."""
    _kill_before(fusion, "spread", count)


def _in_a_measurement(count: int) -> None:
    """A method is about to measure a gradient."""
    _kill_before(EngineProbe, "gradient", count)


def _in_results(count: int) -> None:
    """The units are written, their scores are not."""
    _kill_before(unit_method, "save_file", count)


def _between_renames(count: int) -> None:
    """The old folder has been moved aside, but the new one is not published yet."""
    original, calls = os.rename, iter(range(1, 10**9))

    def dying(source: Any, target: Any) -> None:
        original(source, target)
        if next(calls) == count:
            _die()

    atomic.os.rename = dying


def _before_the_step_of(count: int, act: Callable[[], None]) -> None:
    """Call `act` before the `count`-th step."""
    original, calls = TaskTrainer.step, iter(range(1, 10**9))

    def acting(self: TaskTrainer, step: int) -> Any:
        if next(calls) == count:
            act()
        return original(self, step)

    TaskTrainer.step = acting  # type: ignore[method-assign]


def _dead_loop(count: int) -> None:
    """Not killed: the rank computes forever."""

    def loop_for_ever() -> None:
        while True:
            pass

    _before_the_step_of(count, loop_for_ever)


def _extra_collective(count: int) -> None:
    """Not killed: the rank waits in a collective operation that no other rank joins."""
    _before_the_step_of(count, torch.distributed.barrier)


def _asked_to_stop(count: int) -> None:
    """Not killed: the process gets a SIGTERM, as from a scheduler."""
    _before_the_step_of(count, lambda: os.kill(os.getpid(), signal.SIGTERM))


def _asked_to_stop_in_evaluation(count: int) -> None:
    """Not killed: the process gets a SIGTERM before it scores its `count`-th batch."""
    original, calls = PromptScorer.score, iter(range(1, 10**9))

    def acting(self: PromptScorer, indices: Sequence[int]) -> Any:
        if next(calls) == count:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, indices)

    PromptScorer.score = acting  # type: ignore[method-assign]


def _full_disk(count: int) -> None:
    """Not killed: another process fills the disk just before this rank writes its tensors."""
    original, calls = spans.save_file, iter(range(1, 10**9))

    def filling(tensors: dict[str, Any], path: Path) -> None:
        if next(calls) == count:
            fill(next(folder for folder in path.parents if folder.is_mount()) / "filler")
        original(tensors, path)

    spans.save_file = filling


def _full_disk_at_a_line(count: int) -> None:
    """Not killed: the disk has no space for this rank's `count`-th line (log, data order) or any later one."""
    original, calls = LineFile.append, iter(range(1, 10**9))

    def refusing(self: LineFile, value: Any) -> None:
        if next(calls) >= count:
            with atomic.raising_disk_full(self._path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(self, value)

    LineFile.append = refusing  # type: ignore[method-assign]


def _full_disk_at_the_metrics(count: int) -> None:
    """Not killed: the disk has no space for the last write."""
    original = ledger.write_json

    def refusing(path: Path, value: Any) -> None:
        if path.name == "metrics.json":
            with atomic.raising_disk_full(path):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(path, value)

    ledger.write_json = refusing


def fill(path: Path) -> None:
    """Write zeros to a file until the disk is full."""
    with suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def _clock_ahead(count: int) -> None:
    """Not killed: at the `count`-th check, this rank's clock says that the save interval has elapsed."""
    original, calls = CheckpointSchedule.minutes_over, iter(range(1, 10**9))

    def ahead(self: CheckpointSchedule) -> bool:
        return next(calls) == count or original(self)

    CheckpointSchedule.minutes_over = ahead  # type: ignore[method-assign]


def _folder_locked(count: int) -> None:
    """Not killed: another process takes the run folder's lock just before this rank does."""
    original, held = RunLock.__enter__, []

    def beaten(self: RunLock) -> RunLock:
        held.append(self.path.open("a+"))
        fcntl.flock(held[-1], fcntl.LOCK_EX)
        return original(self)

    RunLock.__enter__ = beaten  # type: ignore[method-assign]


def _failing_recovery(count: int) -> None:
    """Not killed: an I/O error occurs while the run folder is cleaned up."""

    def failing(self: RunFolder) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    RunFolder.recover = failing  # type: ignore[method-assign]


def _stale_manifest(count: int) -> None:
    """Not killed: this rank's node does not see the manifest yet."""

    def missing(path: Path) -> Manifest:
        raise BadInput(f"{path} is missing")

    Manifest.read = missing  # type: ignore[method-assign, assignment]


MOMENTS: dict[str, Callable[[int], None]] = {
    "step": _before_step,
    "tensor file": _half_a_tensor_file,
    "publish": _before_publishing,
    "naming": _before_naming,
    "task": _before_a_task,
    "evaluation": _in_evaluation,
    "export": _in_export,
    "general ability": _in_general_ability,
    "fusion": _in_fusion,
    "results": _in_results,
    "measurement": _in_a_measurement,
    "rename": _between_renames,
    "stop": _asked_to_stop,
    "stop in evaluation": _asked_to_stop_in_evaluation,
    "dead loop": _dead_loop,
    "extra collective": _extra_collective,
    "full disk": _full_disk,
    "full disk at a line": _full_disk_at_a_line,
    "full disk at the metrics": _full_disk_at_the_metrics,
    "folder locked": _folder_locked,
    "failing recovery": _failing_recovery,
    "stale manifest": _stale_manifest,
    "clock": _clock_ahead,
}
