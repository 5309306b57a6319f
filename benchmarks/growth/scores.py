"""The cost of many tasks outside of training: the pictures of the report, and the bytes written for scores.

    python -m cl_dist.benchmarks.growth.scores 10 100 500

Every picture is drawn from random scores. The bytes are those of the last task's row: each score is added to the
current row and then the row to the matrix, as in a run, in a temporary folder.
"""

from __future__ import annotations

import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from cl_dist.report import pictures
from cl_dist.state.inputs import Inputs, ModelDigest, SplitDigest, TaskDigest
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import NOTHING_SCORED, Manifest
from cl_dist.state.run_folder import RunFolder

HEADER = (
    "tasks",
    "matrix, s",
    "scores, s",
    "peak, MiB",
    "last row, KiB",
    "manifest, KiB",
    "a score, ms",
    "status, s",
)


def measure(tasks: int) -> tuple[str, ...]:
    """One line of the table."""
    names = tuple(f"task-number-{number}" for number in range(tasks))
    draws = random.Random(0)
    matrix = tuple(tuple(draws.random() for _ in names) for _ in range(tasks + 1))
    drawn = [_seconds(draw(names, matrix).render) for draw in (pictures.accuracy_matrix, pictures.scores)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    with tempfile.TemporaryDirectory() as folder:
        written = _written(names, matrix, RunFolder(Path(folder)))
    return (str(tasks), *(f"{value:.2f}" for value in drawn), str(peak), *written)


def _written(names: tuple[str, ...], matrix: tuple[tuple[float, ...], ...], folder: RunFolder) -> tuple[str, ...]:
    tasks = len(names)
    split = SplitDigest(samples=1000, sha256="0" * 64)
    data = {name: TaskDigest(train=split, evaluation=split, answers="0" * 64) for name in names}
    model = ModelDigest(source="model", files={"model.safetensors": "0" * 64})
    ledger = Ledger(
        folder,
        Manifest(
            tasks=names,
            world_size=1,
            zero_stage=2,
            completed=tasks - 1,
            accuracy_matrix=matrix[:-1],
            timings=({"train_seconds": 1.5, "steps": 100, "tokens": 10000, "evaluate_seconds": 0.5},) * (tasks - 1),
            inputs=Inputs(data=data, base_model=model, tokenizer=model),
        ),
        writer=True,
    )
    ledger.start("")
    scores = folder.path / "scores.jsonl"
    before = scores.stat().st_size
    seconds = _seconds(lambda: _score(ledger, matrix[-1]))
    ledger.update(accuracy_matrix=matrix, completed=tasks, **NOTHING_SCORED)
    manifest = folder.manifest.stat().st_size
    row = scores.stat().st_size - before + manifest
    read = _seconds(lambda: Manifest.read(folder.manifest))
    return f"{row / 1024:.0f}", f"{manifest / 1024:.0f}", f"{1000 * seconds / tasks:.2f}", f"{read:.2f}"


def _score(ledger: Ledger, scores: Sequence[float]) -> None:
    for task, score in enumerate(scores):
        ledger.scored(task, score)


def _seconds(work: Callable[[], object]) -> float:
    """Seconds of processor time that `work` takes."""
    began = time.process_time()
    work()
    return time.process_time() - began


def main(sizes: list[int]) -> None:
    """Print a table with a line for each number of tasks."""
    print("| " + " | ".join(HEADER) + " |", "|" + "---:|" * len(HEADER), sep="\n")
    pictures.accuracy_matrix(["a"], [[0.5]]).render()  # imports matplotlib outside of the measurement
    for tasks in sizes:
        print("| " + " | ".join(measure(tasks)) + " |", flush=True)


if __name__ == "__main__":
    main([int(word) for word in sys.argv[1:]] or [10, 100, 500])
