#!/usr/bin/env python3
"""Time per optimiser step with KIF's importance on and off, in turns, in one process per rank: a Markdown table.

Usage:
    python benchmarks/kif_overhead.py [--model builtin:llama-tiny | FOLDER] [--lora 8] [--stage 2] [--tokens 512]
    torchrun --nproc_per_node 2 benchmarks/kif_overhead.py --lora 0

Both engines hold the same model and see the same batches; blocks of steps alternate, so that a busy machine slows both.
The last column is the time of importance and penalty themselves, which a noisy machine cannot hide.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch

from cl_dist.assembly import cache_folder
from cl_dist.config.schema import (
    KifConfig,
    LoraConfig,
    ModelConfig,
    Recipe,
    StreamConfig,
    TaskConfig,
    TrainConfig,
    ZeroConfig,
)
from cl_dist.engine.distributed import join, leave
from cl_dist.engine.ds_config import deepspeed_config
from cl_dist.engine.engine import TrainingEngine
from cl_dist.methods.base import Method, TaskPlace
from cl_dist.methods.kif import Kif
from cl_dist.models.load import LoadedModel, load_model
from cl_dist.models.lora import add_lora
from cl_dist.models.structure import base_model
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.types import Encoded


def main() -> None:
    """Time both and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:llama-tiny")
    parser.add_argument("--gguf", help="GGUF file in the model's folder")
    parser.add_argument("--lora", type=int, default=8, help="rank of the adapters; 0: full fine-tuning")
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=512, help="per rank and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sample")
    parser.add_argument("--blocks", type=int, default=10, help="blocks of each kind; the first is a warm-up")
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    options = parser.parse_args()
    os.environ.setdefault("RANK", "0")
    os.environ.setdefault("WORLD_SIZE", "1")
    os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29531")
    rank, world = join(1800)
    engines = {name: build(options, methods) for name, methods in METHODS.items()}
    times = measure(options, engines)
    off, on = (median(times[name]) for name in ("off", "on"))
    if rank == 0:
        kind = f"LoRA r {options.lora}" if options.lora else "full"
        print("| model | trained | ZeRO | ranks | tokens a step | off | on | overhead | of it in the method |")
        print("|---|---|---|---|---|---|---|---|---|")
        print(
            f"| {Path(options.model).name} | {kind} | {options.stage} | {world} | {options.tokens * world} "
            f"| {off * 1e3:.1f} ms | {on * 1e3:.1f} ms | {100 * (on / off - 1):+.1f} % "
            f"| {median(Timed.seconds) * 1e3:.1f} ms |"
        )
    leave()


METHODS = {"off": [], "on": [KifConfig(name="kif")]}


class Timed(Kif):
    """KIF that notes how long it takes before every update, on this rank."""

    seconds: ClassVar[list[float]] = []

    def before_update(self) -> None:
        """Do it and note the seconds."""
        began = time.perf_counter()
        super().before_update()
        self.seconds.append(time.perf_counter() - began)


def build(options: argparse.Namespace, methods: list[KifConfig]) -> TrainingEngine:
    """An engine with or without the method."""
    recipe = Recipe(
        model=ModelConfig(
            name_or_path=options.model,
            gguf_file=options.gguf,
            lora=LoraConfig(r=options.lora) if options.lora else None,
        ),
        stream=StreamConfig(tasks=(TaskConfig(name="t", format="builtin"),)),
        train=TrainConfig(micro_batch_size=options.tokens // options.length, max_length=options.length),
        zero=ZeroConfig(stage=options.stage),
        output_dir="unused",
    )
    chosen: list[Method] = [Timed(config) for config in methods]
    engine = TrainingEngine(load(recipe), recipe, chosen)
    engine.before_task(TaskPlace(0, "t", options.blocks * options.steps))
    return engine


def load(recipe: Recipe) -> LoadedModel:
    """The recipe's model, with adapters where it has them."""
    zero3 = deepspeed_config(recipe) if recipe.zero.stage == 3 else None
    loaded = load_model(
        recipe.model, 2, zero3_config=zero3, dtype=torch.float32, seed=recipe.train.seed, cache_dir=cache_folder()
    )
    if recipe.model.lora is None:
        return loaded
    model = add_lora(base_model(loaded.model), recipe.model.lora, loaded.objective, recipe.train.seed)
    return LoadedModel(model, loaded.tokenizer, loaded.objective)


def measure(options: argparse.Namespace, engines: dict[str, TrainingEngine]) -> dict[str, list[float]]:
    """Seconds per step of every block but the first, in turns."""
    times: dict[str, list[float]] = {name: [] for name in engines}
    batch = random_batch(options)
    targets = batch.targets * torch.distributed.get_world_size()
    for block in range(options.blocks):
        for name, engine in engines.items():
            began = time.perf_counter()
            for step in range(options.steps):
                engine.train_step(step, [batch], targets)
            if block > 0:
                times[name].append((time.perf_counter() - began) / options.steps)
    return times


def random_batch(options: argparse.Namespace) -> Batch:
    """Samples of random tokens; the second half is the answer."""
    torch.manual_seed(0)
    half = options.length // 2
    ids = torch.randint(3, 200, (options.tokens // options.length, options.length)).tolist()
    samples = [Encoded(index, row, [-100] * half + row[half:]) for index, row in enumerate(ids)]
    return collate(samples, "causal_lm", pad_id=0, decoder_start_id=None)


if __name__ == "__main__":
    main()
