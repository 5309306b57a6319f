"""A fault campaign: small runs, each hit by one fault at a random moment and then resumed. Prints a Markdown table.

Usage:
    python -m tests.faults.campaign [--runs 156] [--only N ...] [--seed 0] [--out runs/faults]

Every run is two real ranks of `cl-dist run`, forked from a process that has already imported the libraries. Like the
launcher, that process ends the other rank when one fails. Run i of a seed is always hit by the same fault, after the
same number of events (lines of its log) and a fraction of a second. A run that the fault missed, because it had ended
or had not saved anything to damage, is repeated with an earlier moment. A run passes if

- `--resume` ends with the weights, scores and data order of an undisturbed run, bit for bit; or
- the fault destroyed the only copy of something or replaced the data, and `--resume` refuses with one sentence, leaves
  the models of finished tasks untouched, and ends as above once the file is restored.

Every run adds a line to OUT/results.jsonl; called again, the campaign continues where it stopped. Linux only. The
full-disk fault needs user namespaces (`unshare -Urm`); without them it is skipped, and the table says so.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.ranks import free_port
from tests.zygote import fork_rank, preload, wait_for_ranks

WORLD = 2
TIMEOUT = 300.0
"""Maximum seconds for a command on a busy machine."""
HANG_SECONDS = 12.0
POLL_SECONDS = 0.01
PORT_ATTEMPTS = 3
HIT_ATTEMPTS = 5
LONGEST_DELAY = 0.4
"""Maximum seconds between the event that triggers a fault and the fault: longer than a step, evaluation or save."""
DISK = "48m"
"""Size of the disk that fills up."""
INSIDE = "CL_DIST_FAULTS_NAMESPACE"

RECIPES: dict[str, dict[str, Any]] = {
    "migu, LoRA, ZeRO-2": {
        "model": {"name_or_path": "builtin:llama-tiny", "lora": {"r": 4, "dropout": 0.1}},
        "method": {"name": "migu", "mask": "update"},
        "zero": {"stage": 2},
    },
    "kif, LoRA, ZeRO-3": {
        "model": {"name_or_path": "builtin:llama-tiny", "lora": {"r": 4, "dropout": 0.1}},
        "method": {"name": "kif"},
        "zero": {"stage": 3},
    },
    "sequential, full, ZeRO-1": {
        "model": {"name_or_path": "builtin:t5-tiny"},
        "method": {"name": "sequential"},
        "train": {"keep_optimizer": True},
        "zero": {"stage": 1},
    },
}
"""The runs: every kind of state (masks, importance and fusion, kept moments) and every way to shard it."""
STEPS = 10
COMMON: dict[str, dict[str, Any]] = {
    "stream": {
        "tasks": [{"name": "spring", "format": "builtin"}, {"name": "summer", "format": "builtin"}],
        "max_train_samples": 8 * STEPS,
        "max_eval_samples": 16,
    },
    "train": {"micro_batch_size": 4, "learning_rate": 1e-3, "max_length": 64},
    "launch": {"processes": 2, "hang_seconds": 120.0},
    "checkpoint": {"every_steps": 3},
}


@dataclass
class Outcome:
    """The result of one run."""

    number: int
    fault: str
    recipe: str
    events: int
    """Number of lines in the log when the fault occurred."""
    verdict: str = "?"
    """`same weights`, `refused, then same weights`, or what is wrong."""
    hit: bool = False
    """Whether the fault had an effect: the run was in progress, and the file to damage existed."""
    after: str = ""
    """The last event in the log when the fault occurred: what had been finished, not what was in progress."""
    details: list[str] = field(default_factory=list)
    """Exit codes and last messages, in order."""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether the run was hit, and nothing was lost."""
        return self.hit and self.verdict.endswith("same weights")


@dataclass
class Job:
    """One start of the ranks."""

    ranks: list[int]
    """Their process ids."""
    output: Path

    def signal(self, number: int, *ranks: int) -> None:
        """Send a signal to these ranks. One that has ended is a zombie and keeps its pid until it is waited for."""
        for rank in ranks:
            os.kill(self.ranks[rank], number)

    @property
    def ended(self) -> bool:
        """Whether all ranks have ended, even if nobody has waited for them yet."""
        return all(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z" for pid in self.ranks)

    def texts(self) -> list[str]:
        """Each rank's output."""
        return [file.read_text(errors="replace").strip() for file in sorted(self.output.glob("rank-*.txt"))]

    def last_line(self) -> str:
        """The last line of the first rank that printed anything."""
        return next((text.splitlines()[-1].strip()[:400] for text in self.texts() if text), "")


class Run:
    """One run folder and the commands that work on it.

    Args:
        folder: Where recipe and run are; on a separate disk for the fault that fills it.
        recipe: A key of `RECIPES`.
        files: Whether the data is in files beside the recipe.
    """

    def __init__(self, folder: Path, recipe: str, files: bool = False) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.run, self.file = folder, folder / "run", folder / "recipe.yaml"
        self.output = folder.with_name(f"{folder.name}-output")
        """The folder for the commands' output; outside the run folder, whose disk may be full."""
        self.commands = 0
        content: dict[str, Any] = {"output_dir": str(self.run)}
        for section in (COMMON, RECIPES[recipe]):
            for key, value in section.items():
                content[key] = {**content.get(key, {}), **value}
        if files:
            content["stream"]["tasks"] = [{"name": name, "path": str(folder / name)} for name in write_data(folder)]
        self.file.write_text(yaml.safe_dump(content))

    def start(self, *arguments: str, pipe: tuple[int, int] | None = None) -> Job:
        """Start `cl-dist run` on the recipe; the first rank prints to the second end of `pipe`."""
        self.commands += 1
        output = self.output / str(self.commands)
        output.mkdir(parents=True, exist_ok=True)
        argv = ["run", str(self.file), *arguments]
        job = {"argv": argv, "folder": str(output), "world": WORLD, "fault": None, "port": free_port()}
        if pipe is not None:
            job |= {"output": pipe[1], "foreign": [pipe[0]]}
        return Job([fork_rank(job, rank) for rank in range(WORLD)], output)

    def finish(self, job: Job, outcome: Outcome, what: str) -> int:
        """Wait for the command and record how it ended."""
        codes = wait_for_ranks(job.ranks, TIMEOUT)
        said = "" if codes == [0] * WORLD else f": {job.last_line()}"
        outcome.details.append(f"{what}: exit codes {codes}{said}")
        return next((code for code in codes if code != 0), 0)

    def resume(self, outcome: Outcome, what: str = "--resume") -> int:
        """Resume the run to its end."""
        for _ in range(PORT_ATTEMPTS):
            code = self.finish(self.start("--resume"), outcome, what)
            if "EADDRINUSE" not in outcome.details[-1]:  # the port was taken; try another one, as the launcher does
                break
        return code

    def events(self) -> list[str]:
        """Names of the log's events so far."""
        try:
            lines = (self.run / "log.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with suppress(ValueError):  # the last line may be incomplete
                found.append(str(json.loads(line)["event"]))
        return found

    def end_state(self) -> dict[str, Any]:
        """Checksums of every task's weights, the accuracy matrix, and the data order."""
        matrix = json.loads((self.run / "metrics.json").read_text())["accuracy_matrix"]
        return {"models": self.models(), "matrix": matrix, "order": (self.run / "data_order.jsonl").read_text()}

    def models(self) -> dict[str, str]:
        """Checksum of every task's exported weights."""
        files = sorted(self.run.glob("tasks/*/model/*.safetensors"))
        return {str(file.relative_to(self.run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}

    def manifest(self) -> dict[str, Any]:
        """Progress in the manifest; nothing before the run has started."""
        try:
            found: dict[str, Any] = json.loads((self.run / "manifest.json").read_text())
            return found
        except FileNotFoundError:
            return {"checkpoints": [], "completed": 0}


def write_data(folder: Path) -> list[str]:
    """Write files of two tasks; returns their names, which are those of their folders."""
    directions = ("north", "south", "east", "west")
    for shift, name in enumerate(("spring", "summer")):
        (folder / name).mkdir(exist_ok=True)
        for split, count in (("train", 8 * STEPS), ("test", 16)):
            records = (
                {"input": f"{name} {split} {number} where to", "output": directions[(number + shift) % 4]}
                for number in range(count)
            )
            (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ["spring", "summer"]


@dataclass
class Scene:
    """A run at the moment of its fault."""

    run: Run
    job: Job
    random: random.Random
    outcome: Outcome
    backup: tuple[Path, bytes] | None = None
    """The original of a file that was damaged or replaced."""
    pipe: tuple[int, int] | None = None
    """The pipe that the first rank prints to."""
    refusal: int | None = None
    """The exit code that the resume must have before the file is restored; None if it may refuse or not."""


def kill_one_rank(scene: Scene) -> bool:
    """SIGKILL for one rank; the other one is stopped soon after."""
    scene.job.signal(signal.SIGKILL, scene.random.randrange(WORLD))
    return scene.run.finish(scene.job, scene.outcome, "the run") != 0


def kill_all(scene: Scene) -> bool:
    """SIGKILL for all ranks at once, as in a power loss."""
    scene.job.signal(signal.SIGKILL, *range(WORLD))
    return scene.run.finish(scene.job, scene.outcome, "the run") != 0


def stop_one_rank(scene: Scene) -> bool:
    """SIGSTOP for one rank: nothing ends on its own, so the watchdog of the other rank has to notice."""
    stopped = scene.random.randrange(WORLD)
    scene.job.signal(signal.SIGSTOP, stopped)
    began = time.monotonic()
    code = scene.run.finish(scene.job, scene.outcome, "the run")
    if time.monotonic() - began > TIMEOUT:
        scene.outcome.verdict = "the hang was not noticed"
    return code != 0


def ask_to_stop(scene: Scene) -> bool:
    """SIGTERM for all ranks, as before preemption."""
    scene.job.signal(signal.SIGTERM, *range(WORLD))
    code = scene.run.finish(scene.job, scene.outcome, "the run")
    return _noted(scene, code, problem_of_a_stop(code, began=bool(scene.run.events())))


def problem_of_a_stop(code: int, began: bool) -> str | None:
    """What is wrong with an exit code after SIGTERM: 75 is right, and the signal's own before the run had started."""
    early = (-signal.SIGTERM, 128 + signal.SIGTERM)
    if code in (0, 75) or (code in early and not began):
        return None
    return f"asked to stop, it ended with exit code {code}"


def truncate_newest(scene: Scene) -> bool:
    """All ranks are killed, and a file of the newest saved state is truncated."""
    file = _of_the_newest_state(scene) if kill_all(scene) else None
    if file is not None:
        os.truncate(file, scene.random.randrange(file.stat().st_size))
    return file is not None


def flip_in_newest(scene: Scene) -> bool:
    """All ranks are killed, and one bit of the newest saved state is flipped."""
    file = _of_the_newest_state(scene) if kill_all(scene) else None
    if file is not None:
        content = bytearray(file.read_bytes())
        content[scene.random.randrange(len(content))] ^= 1 << scene.random.randrange(8)
        file.write_bytes(content)
    return file is not None


def delete_a_file(scene: Scene) -> bool:
    """All ranks are killed, and a file of some saved state is deleted."""
    if not kill_all(scene):
        return False
    run = scene.run.run
    file = _pick(scene, sorted(run.glob("checkpoint/task-*/*")) + sorted(run.glob("tasks/*/state/*")))
    if file is not None:
        file.unlink()
    return file is not None


def start_a_second_job(scene: Scene) -> bool:
    """A second job starts in the run folder; the first one continues."""
    resumes = scene.random.random() < 0.5 and (scene.run.run / "manifest.json").exists()
    arguments = ("--resume",) if resumes else ()
    second = scene.run.start(*arguments)
    code = scene.run.finish(second, scene.outcome, f"second job {' '.join(arguments)}")
    # The first job may end while the second one is still starting.
    met = not scene.job.ended or any("is in use by" in text for text in second.texts())
    scene.run.finish(scene.job, scene.outcome, "the run")
    return _noted(scene, int(met), "the second job was not refused" if met and code == 0 else None)


def fill_the_disk(scene: Scene) -> bool:
    """Another process fills the disk; the space is free again before the resume."""
    filler = scene.run.folder / "filler"
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 16))
    code = scene.run.finish(scene.job, scene.outcome, "the run")
    filler.unlink()
    return _noted(scene, code, problem_of_a_full_disk(code, scene.job.texts()))


def problem_of_a_full_disk(code: int, texts: list[str]) -> str | None:
    """What is wrong with the end of a run whose disk was full: some rank must have printed the message."""
    if code == 0:
        return None
    said = [line for text in texts for line in text.splitlines() if line.startswith("cl-dist: ")]
    if code != 1 or not any("no space left on the disk of " in line for line in said):
        return f"on the full disk it ended with exit code {code}: {' / '.join(said)[:400]}"
    return "a traceback on the full disk" if any("Traceback" in text for text in texts) else None


def exchange_the_data(scene: Scene) -> bool:
    """All ranks are killed, and the answers in one data file are changed."""
    if not kill_all(scene):
        return False
    if not (scene.run.run / "manifest.json").exists():
        scene.outcome.details.append("the run had not begun")
        return False
    file = scene.random.choice(sorted(scene.run.folder.glob("s*/*.jsonl")))
    scene.backup, scene.refusal = (file, file.read_bytes()), 2
    file.write_text(file.read_text().replace("north", "up").replace("south", "north").replace("up", "south"))
    scene.outcome.details.append(f"exchanged {file.relative_to(scene.run.folder)}")
    return True


def close_the_pipe(scene: Scene) -> bool:
    """The reader of the run's output goes away (`| head`); every second time the run is also asked to stop, as by
    Ctrl-C, which ends `tee` first.
    """
    assert scene.pipe is not None
    os.close(scene.pipe[0])
    return _went_on(scene)


def stop_the_reader(scene: Scene) -> bool:
    """The reader of the run's output stops reading (Ctrl-S): the pipe is full."""
    assert scene.pipe is not None
    os.set_blocking(scene.pipe[1], False)
    for size in (1 << 16, 1):
        with suppress(BlockingIOError):
            while True:
                os.write(scene.pipe[1], bytes(size))
    os.set_blocking(scene.pipe[1], True)
    return _went_on(scene)


def print_to_a_full_disk(scene: Scene) -> bool:
    """The run's output goes to a file on a full disk, from the start."""
    return _went_on(scene)


def _went_on(scene: Scene) -> bool:
    """Whether the run was in progress; it must finish, or save its state if it was asked to stop."""
    under_way, began = not scene.job.ended, bool(scene.run.events())
    asked = scene.random.random() < 0.5
    if asked:
        scene.outcome.details.append("asked to stop")
        scene.job.signal(signal.SIGTERM, *range(WORLD))
    code = scene.run.finish(scene.job, scene.outcome, "the run")
    problem = problem_of_a_stop(code, began) if asked else (f"it ended with exit code {code}" if code else None)
    _noted(scene, code, problem)
    return under_way


def _noted(scene: Scene, code: int, problem: str | None) -> bool:
    """Record a problem; 0 is the exit code of a run that the fault missed."""
    if problem is not None:
        scene.outcome.verdict = problem
    return code != 0


def _of_the_newest_state(scene: Scene) -> Path | None:
    named = scene.run.manifest()["checkpoints"]
    if named:
        folder = scene.run.run / named[-1]["folder"]
    else:
        folders = sorted(scene.run.run.glob("tasks/*/state"))
        if not folders:
            scene.outcome.details.append("nothing was saved yet")
            return None
        folder = folders[-1]
    return _pick(scene, sorted(folder.iterdir()))


def _pick(scene: Scene, files: list[Path]) -> Path | None:
    """A random file, and a copy of it."""
    files = [file for file in files if file.stat().st_size > 0]
    if not files:
        scene.outcome.details.append("nothing was saved yet")
        return None
    file = scene.random.choice(files)
    scene.backup = (file, file.read_bytes())
    scene.outcome.details.append(f"hit {file.relative_to(scene.run.run)}")
    return file


Fault = Callable[[Scene], bool]
"""Causes the fault; returns whether the run was hit."""
FAULTS: dict[str, Fault] = {
    "SIGKILL of one rank": kill_one_rank,
    "SIGKILL of everything": kill_all,
    "SIGSTOP of one rank": stop_one_rank,
    "SIGTERM": ask_to_stop,
    "newest state truncated": truncate_newest,
    "bit of the newest state flipped": flip_in_newest,
    "file of a saved state deleted": delete_a_file,
    "disk full": fill_the_disk,
    "second job on the run folder": start_a_second_job,
    "data replaced": exchange_the_data,
    "pipe closed": close_the_pipe,
    "reader stopped": stop_the_reader,
    "stdout full": print_to_a_full_disk,
}
GROUPS = (tuple(FAULTS)[:9], tuple(FAULTS)[9:])
"""The first runs take turns with the first faults, so that a number always means the same run."""
RUNS_OF_EACH = 12
PIPES = ("pipe closed", "reader stopped")
OPTIONS: Mapping[str, tuple[str, ...]] = {"SIGSTOP of one rank": ("--set", f"launch.hang_seconds={HANG_SECONDS}")}
"""Additional arguments of the run that is hit."""
DAMAGES = ("newest state truncated", "bit of the newest state flipped", "file of a saved state deleted")
"""Faults that need a saved state."""


def main() -> None:
    """Run the rest of the campaign and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS_OF_EACH * len(FAULTS))
    parser.add_argument("--only", type=int, nargs="+", help="numbers of single runs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    options = parser.parse_args()
    _enter_namespace()
    preload()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.jsonl"
    done = {outcome.number for outcome in read(results)}
    references = {name: reference(out / f"reference-{number}", name) for number, name in enumerate(RECIPES)}
    references |= {
        f"{name}, files": reference(out / f"reference-files-{number}", name, files=True)
        for number, name in enumerate(RECIPES)
    }
    for number in options.only or range(options.runs):
        if number not in done:
            outcome = hit(number, options.seed, out / f"run-{number:03d}", references)
            with results.open("a") as file:
                file.write(json.dumps(asdict(outcome)) + "\n")
            print(f"{number:3d} {outcome.fault} after {outcome.after or 'nothing'}: {outcome.verdict}", file=sys.stderr)
    print(table(read(results)))


def _enter_namespace() -> None:
    """Become root of a user namespace, where small disks can be mounted, if that is allowed."""
    if INSIDE in os.environ:
        return
    probe = ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/tmp"]
    allowed = shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0
    os.environ[INSIDE] = "yes" if allowed else "no"
    if allowed:
        os.execvp("unshare", ["unshare", "-Urm", sys.executable, "-m", "tests.faults.campaign", *sys.argv[1:]])
    del FAULTS["disk full"]
    print("small disks cannot be mounted here: the fault `disk full` is left out", file=sys.stderr)


def read(results: Path) -> list[Outcome]:
    """The recorded outcomes."""
    lines = results.read_text().splitlines() if results.exists() else []
    return [Outcome(**json.loads(line)) for line in lines]


def reference(folder: Path, recipe: str, files: bool = False) -> Mapping[str, Any]:
    """The end of an undisturbed run, and its events."""
    run = Run(folder, recipe, files)
    if not (run.run / "metrics.json").exists():
        shutil.rmtree(run.run, ignore_errors=True)
        noted = Outcome(-1, "none", recipe, 0)
        if run.finish(run.start(), noted, "the undisturbed run"):
            raise SystemExit(f"the undisturbed run failed: {noted.details}")
    return {**run.end_state(), "events": run.events()}


def hit(number: int, seed: int, folder: Path, references: Mapping[str, Mapping[str, Any]]) -> Outcome:
    """One run, its fault, its resume and the verdict; repeated with an earlier moment if the fault missed it."""
    chance = random.Random(f"{seed}/{number}")
    fault, recipe = what_hits(number)
    expected = references[f"{recipe}, files" if fault == "data replaced" else recipe]
    first, last = moments(fault, expected["events"])
    events = chance.randint(first, last)
    for _ in range(HIT_ATTEMPTS):
        outcome = Outcome(number, fault, recipe, events)
        attempt(outcome, chance, folder, expected, last)
        if outcome.hit:
            break
        events = chance.randint(first, events)
    return outcome


def what_hits(number: int) -> tuple[str, str]:
    """Fault and recipe of a run: the faults of a group take turns, and each turn uses the next recipe."""
    recipes = list(RECIPES)
    for group in ([fault for fault in group if fault in FAULTS] for group in GROUPS):
        if number < RUNS_OF_EACH * len(group):
            return group[number % len(group)], recipes[number // len(group) % len(recipes)]
        number -= RUNS_OF_EACH * len(group)
    return what_hits(number)


def moments(fault: str, events: list[str]) -> tuple[int, int]:
    """The earliest and latest number of events after which a fault may occur, if an undisturbed run has `events`.

    Damage needs a saved state. An evaluation and the end of the run must still be ahead.
    """
    return (events.index("saved") + 1 if fault in DAMAGES else 0), len(events) - 2


def attempt(outcome: Outcome, chance: random.Random, folder: Path, expected: Mapping[str, Any], last: int) -> None:
    """Start a run, hit it, and fill in the outcome."""
    began = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(folder.with_name(f"{folder.name}-output"), ignore_errors=True)
    folder.mkdir()
    if outcome.fault == "disk full":
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], check=True)
    run = Run(folder, outcome.recipe, files=outcome.fault == "data replaced")
    pipe = os.pipe() if outcome.fault in PIPES else None
    if outcome.fault == "stdout full":
        pipe = (os.open(os.devnull, os.O_RDONLY), os.open("/dev/full", os.O_WRONLY))
    job = run.start(*OPTIONS.get(outcome.fault, ()), pipe=pipe)
    wait_for_the_moment(run, job, outcome.events, last, chance.uniform(0, LONGEST_DELAY))
    outcome.after = (run.events() or [""])[-1]
    scene = Scene(run, job, chance, outcome, pipe=pipe)
    outcome.hit = FAULTS[outcome.fault](scene)
    for descriptor in pipe or ():
        with suppress(OSError):
            os.close(descriptor)
    if outcome.verdict == "?":
        outcome.verdict = judge(scene, expected) if outcome.hit else "not hit"
    outcome.seconds = round(time.monotonic() - began, 1)
    if outcome.fault == "disk full":
        subprocess.run(["umount", str(folder)], check=True)
    if outcome.passed:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(run.output, ignore_errors=True)


def wait_for_the_moment(run: Run, job: Job, events: int, last: int, delay: float) -> None:
    """Wait for `events` events and `delay` seconds, but no longer than for `last` events or the end of the job."""
    while len(run.events()) < events and not job.ended:
        time.sleep(POLL_SECONDS)
    until = time.monotonic() + delay
    while time.monotonic() < until and len(run.events()) < last and not job.ended:
        time.sleep(POLL_SECONDS)


def judge(scene: Scene, expected: Mapping[str, Any]) -> str:
    """Resume, and compare with the undisturbed run."""
    run = scene.run
    if not (run.run / "manifest.json").exists():
        code = run.finish(run.start(), scene.outcome, "started again, nothing was there yet")
    else:
        code = run.resume(scene.outcome)
    if scene.refusal is not None and code != scene.refusal:
        return f"the resume ended with exit code {code}, where {scene.refusal} is right"
    if code == 0:
        return compare(run, expected)
    if scene.backup is None:
        return "the resume failed"
    if any("Traceback" in file.read_text() for file in run.output.glob(f"{run.commands}/rank-*.txt")):
        return "the resume failed with a traceback"
    completed = run.manifest()["completed"]
    untouched = {name: sha for name, sha in expected["models"].items() if int(name.split("/")[1][:2]) <= completed}
    if {name: sha for name, sha in run.models().items() if name in untouched} != untouched:
        return "refused, but models of finished tasks are damaged"
    path, content = scene.backup
    path.write_bytes(content)
    if run.resume(scene.outcome, "--resume with the file put back"):
        return "refused, and the resume with the file put back failed"
    verdict = compare(run, expected)
    return f"refused, then {verdict}"


def compare(run: Run, expected: Mapping[str, Any]) -> str:
    """`same weights`, or what differs."""
    found = run.end_state()
    differing = [name for name in ("models", "matrix", "order") if found[name] != expected[name]]
    return f"differs in {', '.join(differing)}" if differing else "same weights"


def table(outcomes: list[Outcome]) -> str:
    """A line for each fault."""
    lines = ["| fault | runs | hit | same weights | refused, then same weights | failed |", "|---|---|---|---|---|---|"]
    for fault in [*dict.fromkeys(outcome.fault for outcome in outcomes), "all"]:
        own = [outcome for outcome in outcomes if fault in (outcome.fault, "all")]
        same = sum(outcome.verdict == "same weights" for outcome in own)
        refused = sum(outcome.verdict == "refused, then same weights" for outcome in own)
        struck, failed = sum(outcome.hit for outcome in own), sum(not outcome.passed for outcome in own)
        lines.append(f"| {fault} | {len(own)} | {struck} | {same} | {refused} | {failed} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
