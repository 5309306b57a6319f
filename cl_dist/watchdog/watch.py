"""The watchdog of one rank: one thread decides, another one reads and writes files, which may hang.

Of the ranks whose own last mark is old, one looks at all other ranks (`Lookout`). The job is ended only if no rank has
made progress for `hang_seconds`: a rank that exports the model while the others wait for it keeps them all alive. The
rank that notices leaves a note, and every rank that reads the note writes its stacks and ends.

A library that loads a model or builds the engine makes no marks. Meanwhile processor use counts as progress: a little
by the main thread, which uses none while it waits, or a lot by all other threads together, since some of those poll or
draw as long as the process lives. Time in which the whole process is suspended (a closed laptop, `scontrol suspend`)
does not count: ages grow only while the watchdog itself is awake.
"""

from __future__ import annotations

import faulthandler
import json
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from cl_dist.heartbeat import last_beat
from cl_dist.watchdog.peers import Limits, Lookout, Pulse, PulseFiles, Sighting, describe

SLOWEST_SECONDS = 5.0
"""Longest time between two checks."""
LOOKS = 20
"""Checks per `hang_seconds`, if that is more often."""
BUSY_MAIN = 1e-3
"""A main thread is at work if it uses more than this fraction of one processor between two checks. One that waits for a
lock, a socket or a file uses none (measured: 7e-6, all of it around the wait); one that copies a file at 1 MB/s uses
about this much."""
BUSY_OTHERS = 0.2
"""The same for all other threads together, except for the watchdog's. Measured on a process that waits: 2e-4 with the
threads of torch, DeepSpeed and Gloo, 1.1e-2 with a progress bar. A library that works in threads (a tokenizer) uses
several processors. A spinning NCCL thread looks like work; there the collective's own timeout has to end the job."""
BACKSTOP_SECONDS = 30.0
"""A job that is being ended may take this long to write its messages and stacks; a hanging file system must not keep it
alive."""
NOTE = ".hang.json"
CLAIMS = 3
"""Ranks that give up look at the others one after the other, at most this many. All give up at nearly the same time."""
CLAIM_CHECKS = 8
"""Checks until a rank that gives up no longer waits for the note of another one."""

End = Callable[[str, bool], None]
"""Ends the process at once; called with the message, and whether this rank is the one to print it."""


class Note(NamedTuple):
    """Why the job is ended."""

    rank: int
    """The rank that has left the note."""
    message: str


class Stacks:
    """Context manager for `stack-rank<N>.txt`, which receives the stacks of a hang or of a crash in C code.

    For example, torch ends a process with SIGABRT if an NCCL operation takes too long; the Python stacks of all threads
    show where. The file remains only if something was written.

    Args:
        folder: Created if needed.
        rank: This process's rank.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self._rank = folder / f"stack-rank{rank}.txt", rank

    def __enter__(self) -> Stacks:
        """Open the file now: when it is needed, opening may be what hangs."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("a", encoding="utf-8")
        self._was_enabled = faulthandler.is_enabled()
        faulthandler.enable(self._file)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the file, and delete it if it is empty."""
        faulthandler.enable() if self._was_enabled else faulthandler.disable()
        empty = self._file.tell() == 0
        self._file.close()
        if empty:
            self.path.unlink(missing_ok=True)

    def write(self, reason: str, details: str = "") -> None:
        """Append the stacks of all threads, innermost call first, below a heading with time, rank and `reason`."""
        names = ", ".join(f"{thread.ident or 0:#018x} {thread.name}" for thread in threading.enumerate())
        self._file.write(f"=== {datetime.now():%Y-%m-%d %H:%M:%S} rank {self._rank}: {reason}\n")
        self._file.write(f"{details}threads: {names}\n")
        self._file.flush()
        faulthandler.dump_traceback(self._file, all_threads=True)
        self._file.write("\n")
        self._file.flush()


class Watchdog:
    """Context manager that watches this rank's progress, and ends the process if the job makes none.

    Args:
        folder: A folder that all ranks share, for heartbeats and stacks.
        rank: This process's rank.
        world: World size.
        hang_seconds: Longest time without progress; None: no limit, only the stacks of crashes are written.
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
            for loop in (self._watch, self._exchange)
        ]
        self._awake = 0.0
        """Seconds for which the watchdog has been awake; the clock for everything here."""
        self._exchanged = 0.0
        """When the files were last read and written."""
        self._trouble = "does not answer"
        """Why the files are not read and written."""
        self._beat, self._checked = last_beat(), time.monotonic()
        self._used = (0.0, 0.0)
        """Processor time of the main thread, and of all threads but that and the watchdog's, at the last check."""
        self._pulse = Pulse(0, 0.0, self._beat.phase, waiting=False)
        self._gave_up = False
        """Whether this rank has waited in vain, and is about to end."""
        self._note: Note | None = None
        """What the rank that ends the job has left."""

    @staticmethod
    def prepare(folder: Path) -> None:
        """Delete what an earlier job left behind; call on one rank, before the others start."""
        PulseFiles(folder, 0).clear()
        (folder / NOTE).unlink(missing_ok=True)

    def __enter__(self) -> Watchdog:
        """Start watching."""
        self.stacks.__enter__()
        if self.watches:
            if self.rank == 0:
                with suppress(OSError):  # room for the signature, in case the disk is full when it is needed
                    self._files.sign(None)
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching. Does not return if the watchdog is just ending the job."""
        self._stopping.set()
        if self.watches:
            for thread in self._threads:
                thread.join(BACKSTOP_SECONDS)
            with suppress(OSError):
                self._files.remove(self.rank)
        self.stacks.__exit__(kind, error, traceback)

    def give_up(self, reason: str, traceback: str) -> str:
        """Make every rank write its stacks and end, because this rank cannot continue.

        Args:
            reason: What this rank has found out; a sentence without its full stop.
            traceback: Goes into this rank's stack file.

        Returns:
            The message to fail with: the reason, which rank blocks the job, and where the stacks are.
        """
        self.stacks.write(reason, traceback)
        if not self.watches:
            return self._sentence(reason)
        self._gave_up = True
        message = self._sentence(self._with_blame(reason))
        # From here on, this thread ends the process, and the watch must not.
        self._stopping.set()
        for thread in self._threads:
            thread.join(BACKSTOP_SECONDS)
        note, _ = self._leave_note(message)
        with suppress(OSError):
            self._wait_for_stacks(note.rank)
        return note.message

    def _with_blame(self, reason: str) -> str:
        """The reason with the rank that blocks the job. Only one rank looks: its note ends those that wait here."""
        for number in range(CLAIMS):
            if self._note is not None:
                break
            if self._files.claim(number):
                return f"{reason}; {self._look_twice()}"
            time.sleep(CLAIM_CHECKS * self._interval)
        return reason

    def _look_twice(self) -> str:
        """Name the rank that blocks the job. One whose pulse is the same at both looks is stopped or gone."""
        lookout, limits = Lookout(self._files, self.rank), replace(self._limits, silence=2.5 * self._interval)
        lookout.look(self._awake)
        time.sleep(4 * self._interval)
        lookout.look(self._awake)
        own = Sighting(replace(self._pulse, waiting=True), 0.0)  # this rank was waiting until it gave up
        return describe({self.rank: own, **lookout.sightings()}, limits)

    def _watch(self) -> None:
        """The deciding thread: check this rank's progress until the end."""
        while not self._stopping.wait(self._interval):
            self._take_pulse()
            if self._note is not None:
                self._end_process(self._note, speaks=False)
            elif self._pulse.age > self._limits.hang:
                self._judge()

    def _take_pulse(self) -> None:
        """Advance the clock by the time this process was awake, and update this rank's pulse."""
        now, beat = time.monotonic(), last_beat()
        # A longer gap between two checks means that the process was suspended.
        passed = min(now - self._checked, 2 * self._interval)
        age = min(now - beat.time, passed) if beat.number != self._beat.number else self._pulse.age + passed
        # In an opaque phase, processor use is progress too.
        main = _processor_time(threading.main_thread())
        others = time.process_time() - main - sum(_processor_time(thread) for thread in self._threads)
        busy = main - self._used[0] > BUSY_MAIN * passed or others - self._used[1] > BUSY_OTHERS * passed
        if beat.opaque and busy:
            age = 0.0
        self._used = (main, others)
        self._awake, self._checked, self._beat = self._awake + passed, now, beat
        self._pulse = Pulse(self._pulse.number + 1, age, beat.phase, self._gave_up or _in_collective())

    def _judge(self) -> None:
        """This rank makes no progress: end the job if no other rank does either."""
        if self._awake - self._exchanged > self._limits.silence:
            # The files cannot be used, so nothing is known about the others.
            own = f"rank {self.rank} has made no progress for {self._pulse.age:.0f} s while {self._pulse.phase}"
            message = self._hang(f"{own}, and {self.folder} {self._trouble}")
            self._end_process(Note(self.rank, message), speaks=True, readable=False)
        elif self._lookout.on_duty:
            sightings = {self.rank: Sighting(self._pulse, 0.0), **self._lookout.sightings()}
            if all(self._limits.is_stuck(seen) for seen in sightings.values()):
                self._end_process(*self._leave_note(self._hang(describe(sightings, self._limits))))

    def _hang(self, what: str) -> str:
        return self._sentence(f"no progress for {self._limits.hang:g} s (launch.hang_seconds): {what}")

    def _sentence(self, what: str) -> str:
        return f"{what}; stacks are in {self.folder}, continue from the last saved state with --resume"

    def _exchange(self) -> None:
        """The thread for files: publish this rank's pulse, and while it makes no progress, take part in reading all."""
        while not self._stopping.wait(self._interval):
            try:
                self._files.write(self.rank, self._pulse)
                self._note = self._read_note()
                if self._pulse.age > self._limits.hang / 4:
                    self._lookout.check(self._awake, self._interval)
                else:
                    self._lookout.rest()
            except OSError as error:
                self._trouble = f"cannot be used: {error.strerror}"
                continue
            self._exchanged = self._awake

    def _read_note(self) -> Note | None:
        try:
            return Note(**json.loads((self.folder / NOTE).read_text(encoding="utf-8")))
        except (FileNotFoundError, ValueError, TypeError):  # there is none, or it is being written
            return None

    def _leave_note(self, message: str) -> tuple[Note, bool]:
        """Ask all ranks to end. Returns this rank's note and True, or that of a rank that was faster and False."""
        note = Note(self.rank, message)
        try:
            with (self.folder / NOTE).open("x", encoding="utf-8") as file:
                json.dump(note._asdict(), file)
        except FileExistsError:
            return self._read_note() or note, False
        except OSError:  # this rank has to print the message all the same
            pass
        return note, True

    def _end_process(self, note: Note, speaks: bool, readable: bool = True) -> None:
        """Write this rank's stacks, give the others time to write theirs, and end.

        Args:
            note: Why the job is ended, and by which rank.
            speaks: Whether this rank prints the message.
            readable: Whether the other ranks' files can be read.
        """
        backstop = threading.Timer(BACKSTOP_SECONDS, self._end, (note.message, speaks))
        backstop.daemon = True
        backstop.start()
        with suppress(OSError):
            self.stacks.write(note.message)
            self._wait_for_stacks(note.rank if readable else None)
        self._end(note.message, speaks)

    def _wait_for_stacks(self, author: int | None) -> None:
        """Wait for all ranks that can still write their stacks: the first rank that ends takes the others down.

        The author of the note waits until all other ranks have announced theirs, and then announces its own, for which
        the others wait. If the files cannot be read (None), they all just wait.
        """
        deadline = time.monotonic() + 2 * self._interval + 1.0
        missing = {rank for rank in range(self._files.world) if rank != self.rank} if author == self.rank else {author}
        if author != self.rank:
            self._announce_stacks()
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if rank is None or not self._has_announced(rank)}
            time.sleep(min(self._interval, 0.1))
        if author == self.rank:
            self._announce_stacks()

    def _announce_stacks(self) -> None:
        self._pulse = replace(self._pulse, stacks_written=True)
        self._files.write(self.rank, self._pulse)

    def _has_announced(self, rank: int) -> bool:
        pulse = self._files.read(rank)
        return pulse is not None and pulse.stacks_written


def _processor_time(thread: threading.Thread) -> float:
    """Processor seconds that a thread has used so far."""
    if thread.ident is None or not thread.is_alive():
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread.ident))


def _in_collective() -> bool:
    """Whether a thread of this process is inside torch.distributed, at any depth of its call stack."""
    for frame in list(sys._current_frames().values()):
        inner = frame
        while inner is not None:
            if inner.f_code.co_filename.endswith("torch/distributed/distributed_c10d.py"):
                return True
            inner = inner.f_back  # type: ignore[assignment]
    return False
