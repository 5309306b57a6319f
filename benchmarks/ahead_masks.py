#!/usr/bin/env python3
"""How far MIGU's masks that are known before a step differ from those of the other rules, as a Markdown table.

Usage:
    python benchmarks/ahead_masks.py [RECIPE] [--set KEY=VALUE ...] [--accumulation 8] [--steps 24]

Trains the first tasks of a recipe (by default quickstart) on one rank with `sums: task` and `mask_scope: ahead`. In
every step from a task's second on, the masks of three rules follow from the same magnitudes: `ahead` (the task's steps
before this one), `sums: task` (those and this step) and `sums: step` (this step alone, the default and the public
code's rule). The table has the share of rows that `ahead` keeps and another rule drops, or the other way round; where
30 % of the rows are kept, masks drawn at random differ in 42 %.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import ClassVar

import torch

from cl_dist.config.files import cache_folder
from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.engine.distributed import join, leave
from cl_dist.engine.engine import TrainingEngine
from cl_dist.kernels import flat_row_masks
from cl_dist.launch.environment import rank_environment
from cl_dist.launch.rendezvous import find_free_port
from cl_dist.methods.composed import Composed
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.migu.method import Migu
from cl_dist.methods.protocol import TaskPlace
from cl_dist.models.load import LoadedModel, load_model
from cl_dist.models.lora import add_lora
from cl_dist.models.structure import base_model
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.encode import Encoder, label_names
from cl_dist.tasks.orders import resolve_order
from cl_dist.tasks.stream import load_stream
from cl_dist.tasks.types import Encoded


class Watched(Migu):
    """MIGU that compares its masks with those of the other rules."""

    shares: ClassVar[list[tuple[str, int, float, float]]] = []
    """Task, step from 1, and the share of rows that differ from those of `sums: task` and of `sums: step`."""

    def before_task(self, place: TaskPlace) -> None:
        """Remember the task's name."""
        super().before_task(place)
        self._name = place.name

    def before_update(self) -> None:
        """Compare, once the step's masks are applied and its magnitudes are known."""
        super().before_update()
        if self._summed == 0:
            return  # the first step of a task has no steps before it
        together, before = self._sums.flat, self._sums_before
        others = (self._keep_of(sums) for sums in (together, together - before))
        differ = [float((each != self._kept).double().mean()) for each in others]
        self.shares.append((self._name, self._step + 1, differ[0], differ[1]))

    def _keep_of(self, sums: torch.Tensor) -> torch.Tensor:
        return flat_row_masks(sums, self._sums.sizes, self.config.threshold).keep


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--set", action="append", default=[], dest="changes", metavar="KEY=VALUE")
    parser.add_argument("--accumulation", type=int, default=8, help="micro-batches per step")
    parser.add_argument("--steps", type=int, default=24, help="steps of each task")
    parser.add_argument("--tasks", type=int, default=4, help="tasks of the stream")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        os.environ.update(rank_environment(os.environ, 0, 1, find_free_port()))
    join(1800)
    recipe, folder = load_recipe(options.recipe, options.changes)
    train(options, recipe, folder)
    kind = f"LoRA r {recipe.model.lora.r}" if recipe.model.lora else "full"
    print("| model | trained | task | steps | `sums: task` | in the last half | `sums: step` | in the last half |")
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for name in dict.fromkeys(share[0] for share in Watched.shares):
        rows = [share for share in Watched.shares if share[0] == name]
        late = rows[len(rows) // 2 :]
        task = [fmean(share[2] for share in some) for some in (rows, late)]
        step = [fmean(share[3] for share in some) for some in (rows, late)]
        shown = " | ".join(f"{100 * share:.1f} %" for share in (*task, *step))
        print(f"| {Path(recipe.model.name_or_path).name} | {kind} | {name} | {rows[-1][1]} | {shown} |")
    leave()


def train(options: argparse.Namespace, recipe: Recipe, folder: Path) -> None:
    """Train the first tasks; `Watched.shares` has the result."""
    settings = replace(recipe.train, gradient_accumulation=options.accumulation)
    recipe = replace(resolve_order(recipe, folder), train=settings)
    tasks = load_stream(recipe.stream, folder, settings)[: options.tasks]
    names = label_names(tasks)
    loaded = load(recipe, len(names))
    encoder = Encoder(loaded.tokenizer, loaded.objective, settings, names)
    config = MiguConfig(name="migu", sums="task", mask_scope="ahead", first_task="masked")
    engine = TrainingEngine(loaded, recipe, Composed([Watched(config)]))
    for index, task in enumerate(tasks):
        samples = list(encoder.each_training_sample(task))
        engine.before_task(TaskPlace(index, task.name, options.steps))
        for step, batches in enumerate(islice(global_batches(samples, recipe, loaded), options.steps)):
            engine.train_step(step, batches, sum(batch.targets for batch in batches))


def load(recipe: Recipe, labels: int) -> LoadedModel:
    """The recipe's model in float32, with adapters if the recipe has them."""
    seed = recipe.train.seed
    loaded = load_model(
        recipe.model, labels, zero3_config=None, dtype=torch.float32, seed=seed, cache_dir=cache_folder()
    )
    if recipe.model.lora is None:
        return loaded
    model = add_lora(base_model(loaded.model), recipe.model.lora, loaded.objective, seed)
    return LoadedModel(model, loaded.tokenizer, loaded.objective)


def global_batches(samples: Sequence[Encoded], recipe: Recipe, loaded: LoadedModel) -> Iterator[list[Batch]]:
    """Global batches of shuffled samples, epoch after epoch."""
    micro = recipe.train.micro_batch_size
    size = micro * recipe.train.gradient_accumulation
    draw, pad = torch.Generator().manual_seed(recipe.train.seed), loaded.tokenizer.pad_token_id
    start = getattr(base_model(loaded.model).config, "decoder_start_token_id", None)
    while True:
        order = torch.randperm(len(samples), generator=draw).tolist()
        for first in range(0, len(order) - size + 1, size):
            chosen = [samples[place] for place in order[first : first + size]]
            parts = [chosen[at : at + micro] for at in range(0, size, micro)]
            yield [collate(part, loaded.objective, pad_id=pad, decoder_start_id=start) for part in parts]


if __name__ == "__main__":
    main()
