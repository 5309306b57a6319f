"""Starts the ranks of a run on this machine, monitors them, and reduces their exits to one.

Each rank has its own session: a Ctrl-C in the terminal reaches only the launcher, which forwards it once. The ranks die
with the launcher (`child.die_with_launcher`), and soon after the first rank that fails. They print into pipes that the
launcher keeps draining whatever happens to its own output, so no rank ever blocks on a terminal or a pager.
"""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any, TextIO

from cl_dist.collective_texts import is_collective, meaning, nccl_detail
from cl_dist.errors import BadInput
from cl_dist.launch import child
from cl_dist.launch.child import Failure
from cl_dist.launch.environment import rank_environment
from cl_dist.launch.rendezvous import DEFAULT_ADDRESS, find_free_port
from cl_dist.output import pass_on, same_stream, steady_output
from cl_dist.stop_requests import StopRequests, heeded

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 75
POLL_SECONDS = 0.05
PORT_ATTEMPTS = 3
MOST_RANKS = 1024
"""Limit of ranks on one machine, far more than any machine has cores, GPUs or memory for."""
READ_BYTES = 1 << 16
KEPT_LINES = 100
"""Lines of output kept for each rank other than the first; enough for a traceback through the libraries."""
KEPT_READS = 20
"""Pieces of the first rank's output kept, of at most READ_BYTES."""
SHOWN_LINES = 20
"""How many of these lines are shown if a rank ended without a message."""
SUSPENDED_FACTOR, SUSPENDED_SECONDS = 1.5, 15.0
"""The launcher kills a rank that has been stopped for `SUSPENDED_FACTOR * hang_seconds + SUSPENDED_SECONDS`. The other
ranks notice earlier, and write their stacks."""
AGREEMENT_SECONDS = 2.0
"""Every rank usually finds bad input (exit code 2) itself: how long the others get to report the same before they are
asked to stop. A message that all ranks report is shown once, without a rank."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
HIDE_CURSOR, SHOW_CURSOR = b"\x1b[?25l", b"\x1b[?25h"
SHARED_MEMORY = Path("/dev/shm")
"""Where DeepSpeed puts its buffers."""


@dataclass(frozen=True)
class Ending:
    """How a launch ended."""

    exit_code: int
    message: str | None = None
    """The last message for the user; None after a success, or if the failed rank has printed its own."""
    output: tuple[str, ...] = ()
    """The failed rank's last lines, unless they have been shown already."""


@dataclass
class _Rank:
    """One started rank."""

    index: int
    process: subprocess.Popen[bytes]
    failure_file: Path
    lines: deque[str] = field(default_factory=lambda: deque(maxlen=KEPT_LINES))
    """The last lines of its output, unless the launcher has printed them."""
    printed: deque[bytes] = field(default_factory=lambda: deque(maxlen=KEPT_READS))
    """The last pieces of the output that the launcher has printed, which a library that aborts explains itself in."""
    readers: list[threading.Thread] = field(default_factory=list)
    ended: float | None = None
    """Seconds since the epoch."""
    stopped: bool = False
    """Whether the launcher sent it a signal before it ended."""
    suspended: float = 0.0
    """Seconds for which it has been stopped (SIGSTOP) without a break."""
    given_up: bool = False
    """Whether it was killed for being stopped that long."""
    left_behind: bool = False
    """Whether it was killed because another rank had ended as requested, with everything saved, and it did not."""

    @property
    def returncode(self) -> int | None:
        """As in subprocess: None while it runs, negative for a signal."""
        return self.process.returncode

    def poll(self) -> None:
        """Note whether the rank has ended; if it failed, kill the processes that it started too."""
        if self.ended is not None:
            return
        # WNOWAIT leaves the process a zombie for now: its process group can still be signalled safely.
        state = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if state is None:
            return
        self.ended = time.time()
        if state.si_code != os.CLD_EXITED or state.si_status not in (DONE, INTERRUPTED):
            self._signal_group(signal.SIGKILL)  # before reaping it: until then its id cannot be reused
        self.process.wait()

    def count_suspended(self, passed: float) -> float:
        """Seconds for which it has been stopped without a break; the last call was `passed` seconds ago."""
        if self.returncode is None and not self.given_up:
            stopped = os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
            self.suspended = 0.0 if stopped is None else self.suspended + passed
        return self.suspended

    @property
    def last_output(self) -> str:
        """The end of its output."""
        return "\n".join([b"".join(self.printed).decode("utf-8", "replace"), *self.lines])

    @property
    def failed(self) -> bool:
        """Whether it ended, neither successfully nor interrupted with its state saved."""
        return not self.left_behind and self.returncode not in (None, DONE, INTERRUPTED)

    def signal(self, number: int) -> None:
        """Send a signal to the rank, but not to processes that it started (a compiler, say)."""
        if self.returncode is None:
            self.stopped = True
            self.process.send_signal(number)

    def kill(self) -> None:
        """Kill the rank and all processes that it started."""
        if self.returncode is None:
            self.stopped = True
            self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)


def launch(
    command: Sequence[str],
    processes: int,
    environment: Mapping[str, str],
    grace_seconds: float = 5.0,
    hang_seconds: float | None = None,
) -> Ending:
    """Run `command` as `processes` ranks and wait for all of them.

    This process prints the first rank's output. It forwards the first SIGINT, SIGTERM or SIGHUP as SIGTERM and a first
    SIGUSR1 as SIGUSR1; a second request kills the ranks. When a rank fails, the others are asked to stop and killed
    `grace_seconds` later. A rank that is stopped (SIGSTOP) for well over `hang_seconds` is killed: any other rank that
    is able to would have ended the job by then.
    """
    for attempt in range(1, PORT_ATTEMPTS + 1):
        port = find_free_port()
        ending = _Launch(command, processes, environment, port, grace_seconds, hang_seconds).run()
        # Another program may take the port between our probe and rank 0's bind.
        if attempt == PORT_ATTEMPTS or "EADDRINUSE" not in (ending.message or ""):
            break
    return ending


def check_processes(processes: int) -> None:
    """Raise BadInput for more ranks than one machine can hold, before any rank is started."""
    if processes > MOST_RANKS:
        raise BadInput(
            f"launch.processes: {processes} ranks on this machine, which has {len(os.sched_getaffinity(0))} cores; "
            f"at most {MOST_RANKS} are allowed (cl-dist slurm runs more, on several nodes)"
        )


class _Launch:
    """One attempt to run all ranks."""

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        environment: Mapping[str, str],
        port: int,
        grace_seconds: float,
        hang_seconds: float | None,
    ) -> None:
        self.command = command
        self.processes = processes
        self.environment = environment
        self.port = port
        self.grace_seconds = grace_seconds
        self.longest_suspension = None if hang_seconds is None else SUSPENDED_FACTOR * hang_seconds + SUSPENDED_SECONDS
        self.polled = time.monotonic()
        self.ranks: list[_Rank] = []
        self.requests = 0
        """0: no request to stop, 1: stop and save, 2: stop at once."""
        self.answered = 0
        """How many of these requests the ranks have received."""
        self.request = signal.SIGTERM
        """The signal that forwards the first request. Slurm's warning (SIGUSR1) stays a warning, so that the ranks do
        not take the SIGTERM after it for a second request."""
        self.failed: float | None = None
        """When a rank was first seen to have failed."""
        self.interrupted: float | None = None
        """When a rank was first seen to have ended as requested."""
        self.deadline: float | None = None
        """When to kill the remaining ranks, once a rank has failed."""

    def run(self) -> Ending:
        """Start the ranks, wait for all of them, and return how the launch ended."""
        with steady_output(), tempfile.TemporaryDirectory(prefix="cl-dist-") as folder, self._signals_counted():
            try:
                # A rank that fails while others are still starting is noticed by the first poll.
                for index in range(self.processes):
                    self.ranks.append(self._start(index, Path(folder)))
                while any(rank.returncode is None for rank in self.ranks):
                    self._watch()
                    time.sleep(POLL_SECONDS)
            finally:
                self._clean_up()
            return self._ending()

    def _start(self, index: int, folder: Path) -> _Rank:
        failure_file = folder / f"rank-{index}.json"
        environment = rank_environment(self.environment, index, self.processes, self.port)
        environment[child.LAUNCHER_PID] = str(os.getpid())
        environment[child.FAILURE_FILE] = str(failure_file)
        # Rank 0 keeps its two streams apart, as the launcher's are, unless they lead to the same place: then a single
        # pipe preserves their order. Of the other ranks only the last lines are kept, of both streams together.
        one_pipe = index > 0 or same_stream()
        with _terminal_for(index, environment) as kept_open:
            process = subprocess.Popen(
                self.command,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT if one_pipe else subprocess.PIPE,
                pass_fds=kept_open,
                start_new_session=True,
            )
        rank = _Rank(index, process, failure_file)
        for pipe, stream in ((process.stdout, sys.stdout), (process.stderr, sys.stderr)):
            if pipe is not None:
                if index > 0:
                    reader = threading.Thread(target=_keep_lines, args=(pipe, rank.lines), daemon=True)
                else:
                    reader = threading.Thread(target=_print_all, args=(pipe, stream, rank.printed), daemon=True)
                rank.readers.append(reader)
                rank.readers[-1].start()
        return rank

    @contextmanager
    def _signals_counted(self) -> Iterator[None]:
        """Count requests to stop; `_watch` forwards them."""
        heard = StopRequests()

        def count(number: int, frame: FrameType | None) -> None:
            # Only counts: forwarding happens in `_watch`, since a handler may interrupt any line.
            at_once = heard.ends_at_once(number, time.monotonic())
            if not self.requests and number == signal.SIGUSR1:
                self.request = signal.SIGUSR1
            self.requests = max(self.requests, 2 if at_once else 1)

        before: dict[int, Any] = {number: signal.signal(number, count) for number in heeded(STOP_SIGNALS)}
        # Where SIGCHLD is ignored, as in a notebook's %%bash, the kernel forgets how a process has ended.
        before[signal.SIGCHLD] = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _watch(self) -> None:
        """Poll the ranks once: forward signals, note which ranks ended, and end the others after a failure."""
        # Forward a request to stop that arrived since the last poll.
        if self.requests > self.answered:
            self.answered = self.requests
            if self.requests == 1:
                self._signal_all(self.request)
            else:
                self._kill_all()
        for rank in self.ranks:
            rank.poll()
        self._kill_suspended()
        self._end_after_failure(time.monotonic())
        self._end_after_stop(time.monotonic())

    def _end_after_failure(self, now: float) -> None:
        """After the first failure, ask the other ranks to stop, and kill them `grace_seconds` later."""
        codes = {rank.returncode for rank in self.ranks if rank.failed}
        if not codes:
            return
        self.failed = self.failed or now
        patience = AGREEMENT_SECONDS if codes == {BAD_INPUT} else 0.0
        if self.deadline is None and now >= self.failed + patience:
            self._signal_all(signal.SIGTERM)
            self.deadline = now + self.grace_seconds
        if self.deadline is not None and now > self.deadline:
            self._kill_all()

    def _end_after_stop(self, now: float) -> None:
        """Once a rank has ended as requested, kill those that do not end within `grace_seconds`.

        Ranks agree to stop and save before any of them ends, so nothing is lost. But before that, a rank that waits
        inside a library for one that has ended (torch, for the meeting point) would not notice a signal for as long as
        `launch.timeout_seconds`.
        """
        if all(rank.returncode != INTERRUPTED for rank in self.ranks):
            return
        self.interrupted = self.interrupted or now
        if now > self.interrupted + self.grace_seconds:
            for rank in self.ranks:
                rank.left_behind = rank.left_behind or rank.returncode is None
            self._kill_all()

    def _kill_suspended(self) -> None:
        """Kill ranks that have been stopped for too long."""
        now = time.monotonic()
        # Time during which this process was stopped itself does not count, hence the bound.
        passed, self.polled = min(now - self.polled, 20 * POLL_SECONDS), now
        if self.longest_suspension is None:
            return
        for rank in self.ranks:
            if rank.count_suspended(passed) > self.longest_suspension:
                rank.given_up = True
                rank.kill()

    def _signal_all(self, number: int) -> None:
        for rank in self.ranks:
            rank.signal(number)

    def _kill_all(self) -> None:
        for rank in self.ranks:
            rank.kill()

    def _clean_up(self) -> None:
        """Kill the remaining ranks, and remove what killed ranks leave behind."""
        self._kill_all()
        for rank in self.ranks:
            rank.process.wait()
            for reader in rank.readers:
                reader.join(timeout=1.0)
        if self.ranks and self.ranks[0].returncode != DONE and sys.stdout.isatty():
            pass_on(_closing(b"".join(self.ranks[0].printed)), sys.stdout)
        # DeepSpeed names a buffer after user, rendezvous address and port, and rank (csrc/cpu/comm/shm.cpp). The port
        # was ours, so this matches no other run's buffer.
        for buffer in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_{DEFAULT_ADDRESS}_{self.port}_*"):
            buffer.unlink(missing_ok=True)

    def _ending(self) -> Ending:
        failed = [rank for rank in self.ranks if rank.failed]
        interrupted = [rank for rank in self.ranks if rank.returncode == INTERRUPTED]
        if not failed and not interrupted:
            return Ending(DONE)
        if not failed:
            failure = child.read_failure(interrupted[0].failure_file)
            return Ending(INTERRUPTED, failure.message if failure else None)
        # Ranks that a forwarded signal ended had not installed their handlers yet: there was nothing to save.
        if self.requests and all(rank.returncode == -self.request for rank in failed):
            return Ending(INTERRUPTED, "stopped outside of training; the saved state is intact")
        if self.requests > 1:
            return Ending(1, "killed by a second signal; continue from the last saved state with --resume")
        codes = {rank.returncode for rank in failed}
        return self._blame(failed, exit_code=BAD_INPUT if BAD_INPUT in codes else 1)

    def _blame(self, failed: Sequence[_Rank], exit_code: int) -> Ending:
        """An ending that names the rank that failed first and quotes its message if it left one."""
        failures = {rank.index: child.read_failure(rank.failure_file) for rank in failed}
        culprit = min(failed, key=lambda rank: _order_of_failing(rank, failures[rank.index]))
        own = failures[culprit.index]
        if own is None:  # killed, or failed before it could report: quote its output
            return Ending(
                exit_code, f"rank {culprit.index} {_describe_end(culprit)}", tuple(culprit.lines)[-SHOWN_LINES:]
            )
        # A message that all ranks agree on, about the recipe for example, is not about one rank.
        shared = self.processes == 1 or all(other and other.message == own.message for other in failures.values())
        prefix = "" if own.whole_job or (shared and len(failed) == self.processes) else f"rank {culprit.index}: "
        # With --debug the rank has printed a traceback; without it, a rank that left a message prints nothing else.
        traceback = tuple(culprit.lines) if "--debug" in self.command else ()
        return Ending(exit_code, prefix + own.message, traceback)


@contextmanager
def _terminal_for(index: int, environment: dict[str, str]) -> Iterator[tuple[int, ...]]:
    """Give the first rank the terminal that finally shows its output, if there is one, so that a progress bar fits it;
    yields the file descriptors that the rank inherits.
    """
    if index > 0 or not sys.stdout.isatty():
        yield ()
        return
    descriptor = os.dup(sys.stdout.fileno())
    environment[child.TERMINAL] = str(descriptor)
    try:
        yield (descriptor,)
    finally:
        os.close(descriptor)


def _closing(printed: bytes) -> bytes:
    """What to print after the end of a rank's output: if the rank ended while it drew a bar, the terminal has no cursor
    and is in the middle of a line.
    """
    if printed.rfind(SHOW_CURSOR) > printed.rfind(HIDE_CURSOR):
        return b""
    return SHOW_CURSOR + (b"\n" if printed and not printed.endswith(b"\n") else b"")


def _print_all(pipe: IO[bytes], stream: TextIO, printed: deque[bytes]) -> None:
    """Print the first rank's output until it ends, and keep the last pieces."""
    with pipe:
        while data := os.read(pipe.fileno(), READ_BYTES):
            pass_on(data, stream)
            printed.append(data)


def _keep_lines(pipe: IO[bytes], lines: deque[str]) -> None:
    """Read another rank's output until it ends, and keep the last lines."""
    with io.TextIOWrapper(pipe, encoding="utf-8", errors="replace") as text:
        for line in text:
            lines.append(line.rstrip("\n"))


def _order_of_failing(rank: _Rank, failure: Failure | None) -> tuple[int, float]:
    """Sort key that puts the rank that failed first before the ranks that failed because of it.

    A rank killed from outside is noticed slightly later than the connections that its death breaks, so it sorts first.
    SIGABRT is an exception: torch raises it in its own process when a peer is gone. Ranks that we stopped sort last.
    """
    killed = (rank.returncode or 0) < 0 and rank.returncode != -signal.SIGABRT
    if failure is not None:
        return 1, failure.time
    if rank.stopped and killed and not rank.given_up:
        return 2, rank.ended or 0.0
    return (0 if killed else 1), rank.ended or 0.0


def _describe_end(rank: _Rank) -> str:
    code = rank.returncode or 0
    if code >= 0:
        return f"ended with exit code {code}"
    if rank.given_up:
        return f"was stopped (SIGSTOP) for {rank.suspended:.0f} s (launch.hang_seconds) and has been killed"
    if code == -signal.SIGABRT:
        return _describe_abort(rank.last_output)
    return f"was killed by {signal.Signals(-code).name}"


def _describe_abort(output: str) -> str:
    """What a rank that a library has aborted was up against: NCCL's watchdog in torch says it on standard error."""
    stacks = "the rank's stacks are in logs/ of the run folder"
    found, detail = meaning(output) if is_collective(output) else None, nccl_detail(output)
    if found == "lost":
        lost = "lost another rank, which has ended or cannot be reached, and was ended by torch (SIGABRT)"
        return f"{lost}{f': {detail}' if detail else ''}; {stacks}, continue from the last saved state with --resume"
    if found == "timed out":
        waited = "waited longer than launch.timeout_seconds for the others, and was ended by torch (SIGABRT)"
        return f"{waited}{f': {detail}' if detail else ''}; {stacks}, continue from the last saved state with --resume"
    return (
        "was killed by SIGABRT: a library gave up, torch for example when an NCCL operation takes longer than "
        f"launch.timeout_seconds; {stacks}"
    )
