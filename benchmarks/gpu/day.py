"""Runs the parts of a day with a GPU, each in a process of its own and within its own limit. Imports no framework.

A part that crashes, hangs, runs out of memory or lacks a package costs only itself, mostly only the measurement in
question. Everything measured is in the part's JSON at once, so nothing is lost when the day ends early.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from cl_dist.benchmarks.gpu import measuring
from cl_dist.benchmarks.gpu.findings import overview, tables
from cl_dist.benchmarks.gpu.parts import PARTS, PLANNED_MINUTES, Part
from cl_dist.errors import BadInput, Interrupted
from cl_dist.launch.child import python_command
from cl_dist.state.atomic import make_folder

SUMMARY = "summary.json"
DEVICES = ("auto", "cuda", "cpu")
OUT_OF_TIME, INTERRUPTED, FAILED = "out of time", "interrupted", "failed"
CONTINUED = (measuring.RUNNING, OUT_OF_TIME, INTERRUPTED, measuring.SKIPPED)
"""How a part may have ended that a later call continues; all others are left alone without --again."""
LEAST_SECONDS = 8.0
"""With less time than this, a part is not started: its process would hardly have imported PyTorch."""
POLL_SECONDS = 0.05
GRACE_SECONDS = 3.0


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `cl-dist bench gpu`."""
    parser.description = (
        "Measure what only a GPU can show, most valuable first, within a time limit. Each part runs in its own\n"
        "process and writes its JSON at once. A part whose JSON is there is not measured again, so the same command\n"
        "continues a day that was cut short. Without a GPU the same code runs with tiny sizes (CPU mode)."
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder for the JSON files and logs")
    parser.add_argument("--minutes", default=str(PLANNED_MINUTES), metavar="M", help="time for all parts (default: 9)")
    parser.add_argument("--parts", metavar="A,B", help=f"only these, in this order: {', '.join(PARTS)}")
    parser.add_argument("--list", action="store_true", help="list the parts and their limits, and measure nothing")
    parser.add_argument("--again", action="store_true", help="measure again what is already there")
    parser.add_argument(
        "--device",
        default="auto",
        metavar="NAME",
        help="auto; cuda: refuse to run without a GPU; cpu: tiny sizes on the CPU",
    )


def _minutes(word: str) -> float:
    try:
        minutes = float(word)
    except ValueError:
        minutes = math.nan
    if not (math.isfinite(minutes) and minutes > 0):
        raise BadInput(f"--minutes {word}: invalid value; allowed: a number > 0")
    return minutes


def run(options: Namespace) -> int:
    """Run the parts that the options ask for; returns the exit code.

    Raises:
        BadInput: An option cannot be used, there is no GPU with `--device cuda`, or the folder belongs to another one.
        Interrupted: Ctrl-C or a signal that asks to end; what was measured stays.
    """
    chosen, minutes, say = _chosen(options.parts), _minutes(options.minutes), partial(print, flush=True)
    if options.device not in DEVICES:
        raise BadInput(f"--device {options.device}: invalid value; allowed: {', '.join(DEVICES)}")
    limits = {part.name: part.seconds * minutes / PLANNED_MINUTES for part in chosen}
    if options.list:
        for part in chosen:
            say(f"{part.name:12} {limits[part.name]:4.0f} s  {part.summary}")
        return 0
    folder = _folder(options.out)
    end = time.monotonic() + 60 * minutes
    say(f"{len(chosen)} parts, at most {minutes:g} minutes, into {folder}")
    try:
        with _like_ctrl_c(signal.SIGTERM, signal.SIGHUP):
            for part in chosen:
                _part(part, folder, options, limits[part.name], end, say)
                _summary(folder)
    except KeyboardInterrupt:
        say(f"\n{_summary(folder)}")
        raise Interrupted(f"what was measured is in {folder}; the same command continues") from None
    say(f"\n{_summary(folder)}")
    return 0


def _summary(folder: Path) -> str:
    """Write summary.json; returns the tables."""
    day = {name: found for name in PARTS if (found := measuring.read_part(folder / f"{name}.json")) is not None}
    measuring.replace_json(folder / SUMMARY, overview(day))
    return tables(day)


@contextmanager
def _like_ctrl_c(*numbers: signal.Signals) -> Iterator[None]:
    """Treat these signals like Ctrl-C: a time limit around the command, a connection that is lost."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    # One that is ignored, by nohup for example, stays ignored.
    handled = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _chosen(words: str | None) -> list[Part]:
    names = list(PARTS) if words is None else [word.strip() for word in words.split(",")]
    for name in names:
        if name not in PARTS:
            raise BadInput(f"--parts {words}: there is no part {name!r}; allowed: {', '.join(PARTS)}")
    return [PARTS[name] for name in dict.fromkeys(names)]


def _folder(out: Path | None) -> Path:
    if out is None:
        raise BadInput("--out: give a folder for the results")
    existing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (existing.is_dir() and os.access(existing, os.W_OK)):
        raise BadInput(f"--out {out}: {existing} is not a folder that can be written to; give another one")
    make_folder(out)
    return out


def _part(part: Part, folder: Path, options: Namespace, limit: float, end: float, say: Callable[[str], None]) -> None:
    """Run one part unless it is done; time that earlier parts left over benefits the last ones."""
    path = folder / f"{part.name}.json"
    earlier = measuring.read_part(path)
    if options.again:
        path.unlink(missing_ok=True)
    elif earlier is not None and earlier["status"] not in CONTINUED:
        say(f"{part.name:12} {earlier['status']}, measured before (--again measures it anew)")
        return
    began = time.monotonic()
    limit = min(limit, end - began)
    if limit < LEAST_SECONDS:
        say(f"{part.name:12} not started: no time left")
        return
    try:
        _attempts(part, path, options, began + limit)
    except KeyboardInterrupt:
        _settle(path, INTERRUPTED, "stopped by a signal")
        raise
    found = measuring.read_part(path) or {}
    _settle(path, found.get("status", FAILED), found.get("reason"), seconds=round(time.monotonic() - began, 1))
    say(_line(part.name, measuring.read_part(path) or {}))


def _attempts(part: Part, path: Path, options: Namespace, deadline: float) -> None:
    """Start the part's process, and again after a crash as long as that gets any further."""
    while True:
        before = _count(path)
        code = _process(part, path, options, deadline)
        found = measuring.read_part(path) or {}
        if code == 0 and found.get("status") in (measuring.DONE, measuring.SKIPPED):
            return
        reason = _reason(code, path.with_suffix(".log"))
        if code == measuring.NO_GPU:
            raise BadInput(
                f"--device cuda: {reason}; install a CUDA build of PyTorch and a driver that fits, or use cpu"
            )
        if code == measuring.OTHER_DEVICE:
            raise BadInput(f"--out {path.parent}: {reason}; give another folder")
        if code is None:
            return _settle(path, OUT_OF_TIME, "reached its limit; the same command continues")
        if (blamed := found.get("measuring")) is not None:
            found["measurements"][blamed] = {"failed": reason}
            measuring.replace_json(path, {**found, "measuring": None})
        if _count(path) == before:
            return _settle(path, FAILED, reason, part=part.name)


def _process(part: Part, path: Path, options: Namespace, deadline: float) -> int | None:
    """Run the part's process once; returns its exit code, None if it had to be stopped at the deadline."""
    task = {
        "part": part.name,
        "function": part.function,
        "out": str(path.parent),
        "device": options.device,
        "entry_seconds": measuring.ENTRY_SECONDS,
    }
    command = [*python_command("cl_dist.benchmarks.gpu.measuring:program"), json.dumps(task)]
    with path.with_suffix(".log").open("ab") as log:
        # A session of its own: Ctrl-C reaches only this process, which then stops the part with all that it started.
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            while process.poll() is None:
                if time.monotonic() > deadline:
                    return None
                time.sleep(POLL_SECONDS)
            return process.returncode
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the process and everything it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)


def _count(path: Path) -> int:
    return len((measuring.read_part(path) or {}).get("measurements", ()))


def _reason(code: int | None, log: Path) -> str:
    """Why a process ended, in one line."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    if code is not None and code < 0:
        return f"ended by {signal.Signals(-code).name}"
    if any(line.startswith("Timeout (") for line in lines[-60:]):
        return f"took longer than {measuring.ENTRY_SECONDS:g} s"
    return measuring.first_lines(lines[-1]) if lines else f"exit code {code}"


def _settle(path: Path, status: str, reason: str | None, **more: Any) -> None:
    """Write into the part's JSON how it ended. A measurement that was cut short is left to the next call."""
    found = measuring.read_part(path) or {"mode": None, "device": None, "measurements": {}}
    measuring.replace_json(path, {**found, "status": status, "reason": reason, "measuring": None, **more})


def _line(name: str, found: dict[str, Any]) -> str:
    entries = found["measurements"].values()
    counts = [f"{len(entries)} measurements"]
    for kind in ("failed", "skipped"):
        number = sum(kind in entry for entry in entries)
        counts += [f"{number} {kind}"] if number else []
    reason = f" ({found['reason']})" if found.get("reason") else ""
    mode = "" if found["mode"] in (measuring.GPU_MODE, None) else " [CPU mode]"
    return f"{name:12} {found['status']}{reason}, {found.get('seconds', 0):.0f} s, {', '.join(counts)}{mode}"
