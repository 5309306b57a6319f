#!/usr/bin/env python3
r"""Scoring labels by their likelihood versus generating an answer, on the same samples: time, agreement, accuracy.

Usage:
    python benchmarks/label_scoring.py --data FOLDER/long_sequence --model FOLDER --gguf FILE --csv pairs.csv
    python benchmarks/label_scoring.py --data FOLDER/long_sequence --model runs/first/sequential/tasks/04-agnews/model
    python benchmarks/label_scoring.py ... --adapter runs/lora/tasks/04-agnews/model --answers answers.jsonl

Each batch is scored both ways, starting with the other way each time, and the ratio is that of the two times of one
batch, so that a busy machine affects both. Prompts, lengths, batches and labels are those of an evaluation in a run. A
line of the CSV is written after every batch; the tables are computed from it (--table pairs.csv), even if it is
incomplete. --answers stores the chosen label and the generated text for every sample. docs/results/label-scoring.md
contains its output.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import torch

from cl_dist.config.files import cache_folder
from cl_dist.config.schema import EvalConfig, ModelConfig, StreamConfig, TaskConfig, TrainConfig
from cl_dist.evaluation.batches import cut_batches
from cl_dist.evaluation.inference import evaluating
from cl_dist.evaluation.result import Mode
from cl_dist.evaluation.scorers import Scorer, Subject, make_scorer
from cl_dist.evaluation.scores import normalise
from cl_dist.models.load import load_model
from cl_dist.models.lora import load_adapter
from cl_dist.models.structure import base_model
from cl_dist.tasks.encode import Encoder, label_names
from cl_dist.tasks.stream import load_stream
from cl_dist.tasks.tokenised import TokenisedData
from cl_dist.tasks.types import Task

MODES: tuple[Mode, ...] = ("likelihood", "generate")
COLUMNS = ("task", "samples", "likelihood_s", "generate_s", "agree", "a_label", "likelihood_right", "generate_right")


def main() -> None:
    """Measure, or read earlier measurements, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder in TaSL layout")
    parser.add_argument("--model", help="folder of the model")
    parser.add_argument("--gguf", help="GGUF file in that folder")
    parser.add_argument("--adapter", type=Path, help="folder of a LoRA adapter to put on the model")
    parser.add_argument("--tasks", default="dbpedia,amazon,yahoo,agnews", help="names, separated by commas")
    parser.add_argument("--samples", type=int, default=50, help="number of samples per task, from the start")
    parser.add_argument("--batch", type=int, default=10, help="samples per forward pass")
    parser.add_argument("--length", type=int, default=160, help="longest prompt and answer in tokens")
    parser.add_argument("--new-tokens", type=int, default=50, help="longest generated answer")
    parser.add_argument("--csv", type=Path, default=Path("label-scoring.csv"))
    parser.add_argument("--answers", type=Path, help="write both answers to every sample to this JSON Lines file")
    parser.add_argument("--table", type=Path, help="print the table of this CSV and measure nothing")
    options = parser.parse_args()
    if options.table is None:
        if options.data is None or options.model is None:
            parser.error("give --data and --model, or --table")
        measure(options)
    print(table(read(options.table or options.csv)))


def measure(options: argparse.Namespace) -> None:
    """Score all batches both ways, and write a line after each."""
    tasks = read_tasks(options)
    subject = load(options, tasks)
    with ExitStack() as stack:
        file = stack.enter_context(options.csv.open("w", newline=""))
        answers = stack.enter_context(options.answers.open("w", encoding="utf-8")) if options.answers else None
        stack.enter_context(evaluating(subject.model))
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for number, (line, found) in enumerate(pairs(subject, tasks, options)):
            if number == 0:
                continue  # a warm-up; the first batch comes again
            writer.writerow(line)
            file.flush()
            if answers is not None:
                answers.writelines(json.dumps({"task": line["task"], **answer}) + "\n" for answer in found)
            print(line, file=sys.stderr)


def read_tasks(options: argparse.Namespace) -> tuple[Task, ...]:
    """The tasks, limited to the scored samples."""
    configs = tuple(TaskConfig(name=name, format="tasl", path=".") for name in options.tasks.split(","))
    stream = StreamConfig(tasks=configs, root=options.data, max_train_samples=1, max_eval_samples=options.samples)
    return load_stream(stream, Path.cwd(), TrainConfig())


def load(options: argparse.Namespace, tasks: Sequence[Task]) -> Subject:
    """The model in float32, with the encoder of a run."""
    names = label_names(tasks)
    model = ModelConfig(name_or_path=options.model, gguf_file=options.gguf)
    loaded = load_model(model, len(names), zero3_config=None, dtype=torch.float32, seed=0, cache_dir=cache_folder())
    train = TrainConfig(max_length=options.length, max_target_length=min(50, options.length // 2))
    encoder = Encoder(loaded.tokenizer, loaded.objective, train, names)
    adapted = load_adapter(base_model(loaded.model), options.adapter) if options.adapter else loaded.model
    return Subject(adapted, loaded.tokenizer, loaded.objective, TokenisedData(encoder), names, synced=False)


def pairs(
    subject: Subject, tasks: Sequence[Task], options: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """A line and the answers for each batch, cycling through the tasks; the very first batch comes twice."""
    config = EvalConfig(batch_size=options.batch, max_new_tokens=options.new_tokens)
    queue = []
    for task in tasks:
        scorers = {mode: make_scorer(mode, subject, task, config) for mode in MODES}
        batches = cut_batches(scorers["likelihood"].lengths, options.batch)
        queue += [(place, scorers, task, batch) for place, batch in enumerate(batches)]
    queue.sort(key=lambda entry: entry[0])
    for number, (_, scorers, task, batch) in enumerate([queue[0], *queue]):
        yield score_both(scorers, task, batch, turned=number % 2 == 1)


def score_both(
    scorers: dict[Mode, Scorer], task: Task, batch: list[int], turned: bool
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Times and outcomes of one batch, and both answers to each of its samples."""
    seconds, found = {}, {}
    for mode in reversed(MODES) if turned else MODES:
        began = time.perf_counter()
        found[mode] = scorers[mode].score(batch)
        seconds[mode] = time.perf_counter() - began
    chosen = [normalise(each.prediction) for each in found["likelihood"]]
    written = [normalise(each.prediction) for each in found["generate"]]
    labels = {normalise(label) for label in task.labels}
    answers = [
        {"sample": one.index, "reference": one.reference, "likelihood": one.prediction, "generate": other.prediction}
        for one, other in zip(found["likelihood"], found["generate"], strict=True)
    ]
    line = {
        "task": task.name,
        "samples": len(batch),
        "likelihood_s": round(seconds["likelihood"], 4),
        "generate_s": round(seconds["generate"], 4),
        "agree": sum(one == other for one, other in zip(chosen, written, strict=True)),
        "a_label": sum(text in labels for text in written),
        "likelihood_right": round(sum(each.score for each in found["likelihood"])),
        "generate_right": round(sum(each.score for each in found["generate"])),
    }
    return line, answers


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a CSV, numbers as numbers."""
    with path.open(newline="") as file:
        return [
            {key: value if key == "task" else float(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a line per task and one for all tasks."""
    header = [
        "task",
        "samples",
        "speed ratio, median of the batches (least to largest)",
        "seconds, likelihood and generation",
    ]
    header += ["same answer", "generated text is a label", "right, likelihood", "right, generation"]
    groups = {
        task: [line for line in lines if line["task"] == task] for task in dict.fromkeys(line["task"] for line in lines)
    }
    rows = [
        header,
        ["---"] * len(header),
        *(row(name, group) for name, group in {**groups, "all": list(lines)}.items()),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def row(name: str, lines: Sequence[dict[str, Any]]) -> list[str]:
    """One line of the table."""
    total = {key: sum(line[key] for line in lines) for key in COLUMNS[1:]}
    ratios = [line["generate_s"] / line["likelihood_s"] for line in lines]
    shares = [f"{total[key] / total['samples']:.2f}" for key in COLUMNS[4:]]
    spread = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    seconds = f"{total['likelihood_s']:.0f} and {total['generate_s']:.0f}"
    return [name, f"{total['samples']:.0f}", spread, seconds, *shares]


if __name__ == "__main__":
    main()
