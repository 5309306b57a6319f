#!/usr/bin/env python3
r"""How much evaluating several tasks in one pass saves: padded tokens of the busiest rank, task by task and together.

Usage:
    python benchmarks/passes.py --data FOLDER/long_sequence --model FOLDER [--gguf-file FILE] [--samples 50] \
        [--batch 16] [--length 160]

Only counts tokens and runs no model. Batches are formed and distributed as in evaluation; a batch costs its number of
samples times its longest prompt, and ranks without work wait. docs/results/label-scoring.md contains its output.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer

from cl_dist.config.schema import StreamConfig, TaskConfig, TrainConfig
from cl_dist.evaluation.batches import RankBatch, cut_pass, deal_batches, plan_passes
from cl_dist.tasks.encode import Encoder, label_names
from cl_dist.tasks.orders import ORDERS
from cl_dist.tasks.stream import load_stream

RANKS = (1, 2, 4, 8)


def main() -> None:
    """Count tokens, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder in TaSL layout")
    parser.add_argument("--model", required=True, help="folder with a tokenizer")
    parser.add_argument("--gguf-file", help="GGUF file in that folder, if only that has the tokenizer")
    parser.add_argument("--order", default="4", help="number of a published order")
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=160)
    options = parser.parse_args()
    lengths = prompt_lengths(options)
    print("| ranks | full batches, the rest last | batches of one size | passes over tasks | all samples pooled |")
    print("|---:|---:|---:|---:|---:|")
    pooled = [length for each in lengths for length in each]
    for ranks in RANKS:
        full = sum(cost([each], full_batches(each, options.batch), ranks) for each in lengths)
        even = sum(pass_cost([each], options.batch, ranks) for each in lengths)
        one = pass_cost([pooled], options.batch, ranks)
        print(f"| {ranks} | {full} | {even} | {built_cost(lengths, options.batch, ranks)} | {one} |")


def prompt_lengths(options: argparse.Namespace) -> list[list[int]]:
    """The number of tokens of each prompt, task by task."""
    configs = tuple(TaskConfig(name=name, format="tasl", path=".") for name in ORDERS[options.order])
    stream = StreamConfig(tasks=configs, root=options.data, max_train_samples=1, max_eval_samples=options.samples)
    tasks = load_stream(stream, Path.cwd(), TrainConfig())
    train = TrainConfig(max_length=options.length, max_target_length=min(50, options.length // 2))
    tokenizer = AutoTokenizer.from_pretrained(options.model, gguf_file=options.gguf_file)
    encoder = Encoder(tokenizer, "causal_lm", train, label_names(tasks))
    return [[len(encoder.prompt_ids(example.prompt)) for example in task.evaluation] for task in tasks]


def full_batches(lengths: Sequence[int], size: int) -> list[RankBatch]:
    """Full batches, longest samples first, and a smaller last one."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [RankBatch(order[start : start + size]) for start in range(0, len(order), size)]


def built_cost(lengths: Sequence[Sequence[int]], size: int, ranks: int) -> int:
    """The cost of what evaluation does: passes over several tasks, with batches of one task each."""
    if ranks == 1:
        return sum(pass_cost([each], size, 1) for each in lengths)
    passes = plan_passes([-(-len(each) // size) for each in lengths], ranks)
    return sum(pass_cost(lengths[each.start : each.stop], size, ranks) for each in passes)


def pass_cost(lengths: Sequence[Sequence[int]], size: int, ranks: int) -> int:
    """Padded tokens of the busiest rank in one pass over these tasks."""
    return cost(lengths, cut_pass(lengths, [size] * len(lengths)), ranks)


def cost(lengths: Sequence[Sequence[int]], batches: Sequence[RankBatch], ranks: int) -> int:
    """Padded tokens of the busiest rank."""
    shares = [deal_batches(batches, rank, ranks, synced=False) for rank in range(ranks)]
    return max(
        sum(len(own.indices) * max(lengths[own.task][i] for i in own.indices) for own in share) for share in shares
    )


if __name__ == "__main__":
    main()
