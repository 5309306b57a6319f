"""Runs that look like real ones, for the pictures in the documentation and for the tests in a browser."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.evaluation.result import Prediction, write_predictions
from cl_dist.state.atomic import write_text
from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import Manifest
from cl_dist.state.run_folder import RunFolder
from tests.report.runs import TIMING, llama_lora, write_units

TASKS = ("yelp", "amazon", "mnli", "cb", "copa", "qqp", "rte", "imdb")
LAYERS, RANK = 6, 4


def forgetful(tasks: int, loss: float, seed: int = 0) -> tuple[tuple[float, ...], ...]:
    """A matrix in which every task is learnt in its turn, and loses a share of its gain with each later task."""
    draws = np.random.default_rng(seed)
    start, learnt = draws.uniform(0.05, 0.3, tasks), draws.uniform(0.7, 0.92, tasks)
    rows = [start]
    for after in range(tasks):
        age = np.maximum(0, after - np.arange(tasks))
        kept = start + (learnt - start) * (1 - loss * draws.uniform(0.6, 1.4, tasks)) ** age
        rows.append(np.where(np.arange(tasks) <= after, kept, start + draws.uniform(-0.02, 0.06, tasks)))
    return tuple(tuple(float(round(score, 4)) for score in row) for row in rows)


def write_demo(
    path: Path, method: str, tasks: tuple[str, ...] = TASKS, loss: float = 0.08, done: int = 99
) -> RunFolder:
    """A run of a method that loses this share of what it has learnt with each later task."""
    path.mkdir(parents=True)
    folder, done = RunFolder(path), min(done, len(tasks))
    manifest = Manifest(
        tasks=tasks,
        world_size=2,
        zero_stage=2,
        status="finished" if done == len(tasks) else "interrupted",
        completed=done,
        accuracy_matrix=forgetful(len(tasks), loss)[: done + 1],
        scoring={name: {"metric": "exact_match", "scored_on": "test"} for name in tasks},
        peak_memory_bytes=(512 << 20, 498 << 20),
        timings=(TIMING,) * done,
        device={"kind": "cpu", "name": "two cores"},
        restarts=1,
    )
    ledger = Ledger(folder, manifest, writer=True)
    ledger.start(dump_recipe(load_recipe("quickstart", [f"method.name={method}"])[0]))
    draws = np.random.default_rng(1)
    for name in tasks[:done]:
        for step in range(1, 61):
            ledger.log(event="step", task=name, step=step, loss=0.4 + 2.5 / step + draws.uniform(0, 0.3), seconds=0.1)
    return folder


def kif_run(path: Path) -> RunFolder:
    """Eight tasks with KIF, and its units."""
    folder = write_demo(path, "kif", loss=0.02)
    draws = torch.Generator().manual_seed(3)
    units = 7 * LAYERS * RANK
    scores = list(torch.randn(len(TASKS), units, generator=draws).mul(2).exp())
    write_units(folder, llama_lora(LAYERS, RANK), "rank", scores)
    return folder


def migu_run(path: Path) -> RunFolder:
    """Eight tasks with MIGU, its kept rows, and the predictions that changed."""
    folder = write_demo(path, "migu")
    layers = [
        f"model.layers.{layer}.{kind}_proj.weight" for layer in range(LAYERS) for kind in ("self_attn.q", "mlp.up")
    ]
    draws = np.random.default_rng(2)
    base = {layer: draws.normal(size=64) for layer in layers}
    for position, task in enumerate(TASKS):
        chances = {layer: 1 / (1 + np.exp(4 - 3 * base[layer] - draws.normal(size=64))) for layer in layers}
        counts = {layer: draws.binomial(60, chance).astype(np.int32) for layer, chance in chances.items()}
        meta = {"record": json.dumps({"masked": True, "first_step": 1, "steps": 60, "layers": layers})}
        place = folder.task(position, task)
        place.path.mkdir(parents=True, exist_ok=True)
        save_file(counts, place.kept_rows, meta)
        for where in dict.fromkeys((place, folder.task(len(TASKS) - 1, TASKS[-1]))):
            right = 0.85 if where == place else 0.6
            write_predictions(where.predictions / f"{task}.jsonl", _answers(right, draws))
    return folder


def _answers(right: float, draws: np.random.Generator) -> list[Prediction]:
    labels = ("positive", "negative")
    hits = draws.random(40) < right
    return [
        Prediction(index, labels[(index + int(not hit)) % 2], labels[index % 2], float(hit))
        for index, hit in enumerate(hits)
    ]


ODD = "<b>&\"'<script>alert(1)<\\/script> $x^2$ \u0645\u0631\u062d\u0628\u0627 \U0001f642 {{ 7 * 7 }}"
"""Text that is hard to show: markup, right-to-left letters, emoji, a formula, a template."""


def odd_run(path: Path) -> RunFolder:
    """A run that was stopped half-way, with long and odd names of tasks, with `ODD` wherever a run has text of its user
    (its folder's name too), and without some of the scores.
    """
    names = ("x" * 100, "-.-", "__init__", "4", "later")
    folder = write_demo(path / ODD.replace("/", ""), "kif", names, done=3)
    manifest = Manifest.read(folder.manifest)
    gaps = tuple(
        tuple(None if column == 1 and row % 2 else score for column, score in enumerate(scores))
        for row, scores in enumerate(manifest.accuracy_matrix)
    )
    device = {"kind": "cpu", "name": ODD}
    Ledger(folder, manifest, writer=True).update(accuracy_matrix=gaps, device=device)
    write_text(
        folder.config, folder.config.read_text().replace("builtin:llama-tiny", json.dumps(ODD, ensure_ascii=False))
    )
    for after, answer in ((0, "yes"), (2, ODD)):
        answers = [Prediction(sample, answer, "yes", float(answer == "yes")) for sample in range(4)]
        write_predictions(folder.task(after, names[after]).predictions / f"{names[0]}.jsonl", answers)
    return folder
