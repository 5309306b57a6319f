"""The watchdog of one rank: two threads, one that decides and one that reads and writes files, which may hang.

A rank whose own mark is old looks at the others. Only when no rank of the job has made progress for `hang_seconds` is
it ended: one that exports the model while the others wait for it keeps them all alive. The rank that finds out first
leaves a note, and every rank that sees it writes its stacks and ends.

While a library is at work that makes no marks (loading a model, building the engine), the use of the processor counts
instead: a little of the main thread's, which uses none while it waits, or much of the other threads' together, some of
which poll or draw for as long as the process lives. Time in which a process is suspended as a whole (a laptop's lid,
`scontrol suspend`) does not count: ages grow by what the watchdog itself has been awake for.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from cl_dist.heartbeat import last_beat
from cl_dist.watchdog.lookout import Lookout
from cl_dist.watchdog.pulse import Pulse, PulseFiles
from cl_dist.watchdog.stacks import Stacks
from cl_dist.watchdog.verdict import Limits, Sighting, describe

SLOWEST_SECONDS = 5.0
"""Longest time between two looks."""
LOOKS = 20
"""Looks per `hang_seconds`, where that makes them more frequent."""
BUSY_MAIN = 1e-3
"""Of the time between two looks: a main thread that uses more of a processor is at work. One that waits for a lock, a
socket or a file uses none (measured: 7e-6, all of it around the wait); one that copies a file at 1 MB/s uses about so
much."""
BUSY_OTHERS = 0.2
"""The same for all other threads but the watchdog's. Measured on a process that waits: 2e-4 with the threads of torch,
DeepSpeed and Gloo, 1.1e-2 with a progress bar. A library that leaves its work to threads (a tokenizer) uses several
times 1. A thread of NCCL that spins looks like work: the collective operation's own time-out has to end that."""
BACKSTOP_SECONDS = 30.0
"""How long a job that is to end may take to write what it has to say; a file system that hangs must not keep it."""
NOTE = ".hang.json"

End = Callable[[str, bool], None]
"""Ends the process, now: called with the message, and whether this is the rank that says it."""


class Watchdog:
    """Context manager that watches this rank's progress, and ends the process where the job makes none.

    Args:
        folder: A folder that all ranks share, for heartbeats and stacks.
        rank: This process's rank.
        world: How many ranks there are.
        hang_seconds: How long there may be no progress; None: for ever, only stacks of crashes are written.
        end: Ends the process.
    """

    def __init__(self, folder: Path, rank: int, world: int, hang_seconds: float | None, end: End) -> None:
        hang = hang_seconds or 0.0
        self.folder, self.rank, self.watches = folder, rank, hang_seconds is not None
        self.stacks = Stacks(folder, rank)
        self._end, self._files = end, PulseFiles(folder, world)
        self._lookout = Lookout(self._files, rank)
        self._interval = min(SLOWEST_SECONDS, hang / LOOKS)
        self._limits = Limits(hang, hang / 2)
        self._stopping = threading.Event()
        self._threads = [
            threading.Thread(target=loop, name=f"watchdog {loop.__name__}", daemon=True)
            for loop in (self._watch, self._post)
        ]
        self._awake = 0.0
        """Seconds that the watchdog has been awake for; what everything here is measured in."""
        self._posted = 0.0
        """When files were last read and written."""
        self._trouble = "does not answer"
        """Why they are not."""
        self._beat, self._looked = last_beat(), time.monotonic()
        self._used = (0.0, 0.0)
        """Processor time of the main thread, and of the others but for the watchdog's, at the last look."""
        self._pulse = Pulse(0, 0.0, self._beat.phase, waiting=False)
        self._note: str | None = None
        """Message of the rank that ends the job."""

    @staticmethod
    def prepare(folder: Path) -> None:
        """Forget what a former job left; on one rank, before the others begin."""
        PulseFiles(folder, 0).clear()
        (folder / NOTE).unlink(missing_ok=True)

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        self.stacks.__enter__()
        if self.watches:
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching; where the job is being ended this minute, do not come back."""
        self._stopping.set()
        if self.watches:
            for thread in self._threads:
                thread.join(BACKSTOP_SECONDS)
            with suppress(OSError):
                self._files.remove(self.rank)
        self.stacks.__exit__(kind, error, traceback)

    def give_up(self, reason: str, traceback: str) -> str:
        """Let every rank write its stacks and end, because this one cannot go on.

        Args:
            reason: What this rank has found out; a sentence without its end.
            traceback: Goes into this rank's file.

        Returns:
            The sentence to fail with: the reason, which rank holds the job up, and where the stacks are.
        """
        self.stacks.write(reason, traceback)
        if not self.watches:
            return self._sentence(reason)
        lookout, limits = Lookout(self._files, self.rank), replace(self._limits, silence=2.5 * self._interval)
        lookout.look(self._awake)
        time.sleep(4 * self._interval)
        lookout.look(self._awake)
        own = Sighting(replace(self._pulse, waiting=True), 0.0)  # as it was until it gave up
        sightings = {self.rank: own, **lookout.sightings(self._awake)}
        self._stopping.set()  # this thread ends the process, not the watch
        for thread in self._threads:
            thread.join(BACKSTOP_SECONDS)
        message, _ = self._leave_note(self._sentence(f"{reason}; {describe(sightings, limits)}"))
        with suppress(OSError):
            self._tell_and_wait()
        return message

    def _watch(self) -> None:
        """Look at this rank's progress until the end."""
        while not self._stopping.wait(self._interval):
            self._look()
            if self._note is not None:
                self._obey(self._note, speaks=False)
            elif self._pulse.age > self._limits.hang:
                self._judge()

    def _look(self) -> None:
        """Let time go on, as far as this process was awake, and take this rank's pulse."""
        now, beat = time.monotonic(), last_beat()
        passed = min(now - self._looked, 2 * self._interval)
        age = min(now - beat.time, passed) if beat.number != self._beat.number else self._pulse.age + passed
        main, others = self._processor_times()
        busy = main - self._used[0] > BUSY_MAIN * passed or others - self._used[1] > BUSY_OTHERS * passed
        if beat.opaque and busy:
            age = 0.0
        self._used = (main, others)
        self._awake, self._looked, self._beat = self._awake + passed, now, beat
        self._pulse = Pulse(self._pulse.number + 1, age, beat.phase, _in_collective())

    def _processor_times(self) -> tuple[float, float]:
        """Seconds that the main thread has used, and all others but the watchdog's together."""
        main = _processor_time(threading.main_thread())
        return main, time.process_time() - main - sum(_processor_time(thread) for thread in self._threads)

    def _judge(self) -> None:
        """This rank makes no progress: end the job if no other one does."""
        if self._awake - self._posted > self._limits.silence:
            own = f"rank {self.rank} has made no progress for {self._pulse.age:.0f} s while {self._pulse.phase}"
            self._obey(self._hangs(f"{own}, and {self.folder} {self._trouble}"), speaks=True)
            return
        sightings = {self.rank: Sighting(self._pulse, 0.0), **self._lookout.sightings(self._awake)}
        if all(self._limits.is_stuck(seen) for seen in sightings.values()):
            self._obey(*self._leave_note(self._hangs(describe(sightings, self._limits))))

    def _hangs(self, what: str) -> str:
        return self._sentence(f"no progress for {self._limits.hang:g} s (launch.hang_seconds): {what}")

    def _sentence(self, what: str) -> str:
        return f"{what}; stacks are in {self.folder}, --resume goes on from the last saved state"

    def _post(self) -> None:
        """Tell the others of this rank, and look at them when this one makes no progress."""
        while not self._stopping.wait(self._interval):
            try:
                self._files.write(self.rank, self._pulse)
                self._note = self._read_note()
            except OSError as error:
                self._trouble = f"cannot be used: {error.strerror}"
                continue
            if self._pulse.age > self._limits.hang / 4:
                self._lookout.look(self._awake)
            else:
                self._lookout.forget()
            self._posted = self._awake

    def _read_note(self) -> str | None:
        try:
            return str(json.loads((self.folder / NOTE).read_text(encoding="utf-8"))["message"])
        except (FileNotFoundError, ValueError):  # there is none, or it is being written
            return None

    def _leave_note(self, message: str) -> tuple[str, bool]:
        """Tell all ranks to end; returns the message and True, or that of another rank which was first and False."""
        try:
            with (self.folder / NOTE).open("x", encoding="utf-8") as file:
                json.dump({"rank": self.rank, "message": message}, file)
        except FileExistsError:
            return self._read_note() or message, False
        except OSError:  # this rank has to tell it all the same
            pass
        return message, True

    def _obey(self, message: str, speaks: bool) -> None:
        """Write this rank's stacks, give the others the time to write theirs, and end."""
        backstop = threading.Timer(BACKSTOP_SECONDS, self._end, (message, speaks))
        backstop.daemon = True
        backstop.start()
        with suppress(OSError):
            self.stacks.write(message)
            self._tell_and_wait()
        self._end(message, speaks)

    def _tell_and_wait(self) -> None:
        """Say that this rank's stacks are written, and wait for the other ranks that can write theirs.

        The first rank to end takes the others down.
        """
        self._pulse = replace(self._pulse, told=True)
        self._files.write(self.rank, self._pulse)
        deadline = time.monotonic() + 2 * self._interval + 1.0
        while time.monotonic() < deadline:
            pulses = (self._files.read(rank) for rank in range(self._files.world))
            if all(pulse is not None and pulse.told for pulse in pulses):
                return
            time.sleep(min(self._interval, 0.1))


def _processor_time(thread: threading.Thread) -> float:
    """Seconds that a thread has used so far."""
    if thread.ident is None or not thread.is_alive():
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _in_collective() -> bool:
    """Whether a thread of this process is inside torch.distributed, by the innermost Python call or one around it."""
    for frame in list(sys._current_frames().values()):
        inner = frame
        while inner is not None:
            if inner.f_code.co_filename.endswith("torch/distributed/distributed_c10d.py"):
                return True
            inner = inner.f_back  # type: ignore[assignment]
    return False
