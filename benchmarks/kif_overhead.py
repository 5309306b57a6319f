#!/usr/bin/env python3
"""Time per optimiser step with and without KIF's importance, measured in turns on each rank, as a Markdown table.

Usage:
    python benchmarks/kif_overhead.py [--model builtin:llama-tiny | FOLDER] [--lora 8] [--stage 2] [--tokens 512]
    torchrun --nproc_per_node 2 benchmarks/kif_overhead.py --lora 0

Both engines have the same model and see the same batches. Blocks of steps alternate, and the overhead is the median of
the ratios within a round, so that a busy machine affects both. The last column is the time that rank 0 spends on
importance and penalty, per step after the warm-up; it includes the time for which the penalty waits for other ranks.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from statistics import median
from typing import ClassVar

import torch

from cl_dist.benchmarks.harness import Times, rotated
from cl_dist.config.files import cache_folder
from cl_dist.config.schema import LoraConfig, ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.engine.device import uses_gpu
from cl_dist.engine.distributed import join, leave
from cl_dist.engine.engine import TrainingEngine
from cl_dist.engine.settings import deepspeed_config
from cl_dist.launch.environment import rank_environment
from cl_dist.launch.rendezvous import find_free_port
from cl_dist.methods.composed import Composed
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.kif.method import Kif
from cl_dist.methods.protocol import Method, TaskPlace
from cl_dist.models.load import LoadedModel, load_model
from cl_dist.models.lora import add_lora
from cl_dist.models.structure import base_model
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.types import Encoded


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:llama-tiny")
    parser.add_argument("--gguf", help="GGUF file in the model's folder")
    parser.add_argument("--lora", type=int, default=8, help="rank of the adapters; 0: full fine-tuning")
    parser.add_argument("--stage", type=int, choices=(0, 1, 2, 3), default=2, help="ZeRO stage")
    parser.add_argument("--tokens", type=int, default=512, help="tokens per rank and step")
    parser.add_argument("--length", type=int, default=128, help="tokens per sample")
    parser.add_argument("--blocks", type=int, default=10, help="rounds with a block of each kind, after a warm-up")
    parser.add_argument("--steps", type=int, default=3, help="steps per block")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        os.environ.update(rank_environment(os.environ, 0, 1, find_free_port()))
    rank, world, *_ = join(1800)
    engines = {name: build(options, methods) for name, methods in METHODS.items()}
    times = measure(options, engines)
    if rank == 0:
        kind = f"LoRA r {options.lora}" if options.lora else "full"
        print("| model | trained | ZeRO | ranks | tokens a step | off | on | overhead | of it in the method |")
        print("|---|---|---|---|---|---|---|---|---|")
        print(
            f"| {Path(options.model).name} | {kind} | {options.stage} | {world} | {options.tokens * world} "
            f"| {times.spread('off').median * 1e3:.1f} ms | {times.spread('on').median * 1e3:.1f} ms "
            f"| {100 * (times.ratio('on', 'off').median - 1):+.1f} % "
            f"| {median(Timed.seconds) * 1e3:.1f} ms |"
        )
    leave()


METHODS: dict[str, list[KifConfig]] = {"off": [], "on": [KifConfig(name="kif")]}


class Timed(Kif):
    """KIF that records how long its work before every update takes on this rank."""

    seconds: ClassVar[list[float]] = []

    def before_update(self) -> None:
        """Measure the time of the original."""
        synchronize()
        began = time.perf_counter()
        super().before_update()
        synchronize()
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
        train=TrainConfig(
            micro_batch_size=options.tokens // options.length,
            max_length=options.length,
            max_target_length=options.length // 2,
        ),
        zero=ZeroConfig(stage=options.stage),
        output_dir="unused",
    )
    chosen: list[Method] = [Timed(config) for config in methods]
    engine = TrainingEngine(load(recipe), recipe, Composed(chosen))
    engine.before_task(TaskPlace(0, "t", (options.blocks + 1) * options.steps))
    return engine


def load(recipe: Recipe) -> LoadedModel:
    """The recipe's model, with adapters if the recipe has them."""
    zero3 = deepspeed_config(recipe) if recipe.zero.stage == 3 else None
    loaded = load_model(
        recipe.model, 2, zero3_config=zero3, dtype=torch.float32, seed=recipe.train.seed, cache_dir=cache_folder()
    )
    if recipe.model.lora is None:
        return loaded
    model = add_lora(base_model(loaded.model), recipe.model.lora, loaded.objective, recipe.train.seed)
    return LoadedModel(model, loaded.tokenizer, loaded.objective)


def measure(options: argparse.Namespace, engines: dict[str, TrainingEngine]) -> Times:
    """Seconds per step, measured in turns; the first round is a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    batch = random_batch(options)
    targets = batch.targets * torch.distributed.get_world_size()
    for round_ in range(options.blocks + 1):
        for name in rotated(list(engines), round_):
            torch.distributed.barrier()
            began = time.perf_counter()
            for step in range(options.steps):
                engines[name].train_step(round_ * options.steps + step, [batch], targets)
            synchronize()
            seconds[name].append((time.perf_counter() - began) / options.steps)
    del Timed.seconds[: options.steps]
    return Times({name: each[1:] for name, each in seconds.items()})


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished all work."""
    if uses_gpu():
        torch.cuda.synchronize()


def random_batch(options: argparse.Namespace) -> Batch:
    """Samples of random tokens; the second half is the answer."""
    torch.manual_seed(0)
    half = options.length // 2
    ids = torch.randint(3, 200, (options.tokens // options.length, options.length)).tolist()
    samples = [Encoded(index, row, [-100] * half + row[half:]) for index, row in enumerate(ids)]
    return collate(samples, "causal_lm", pad_id=0, decoder_start_id=None)


if __name__ == "__main__":
    main()
