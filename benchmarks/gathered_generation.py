"""Generation under ZeRO-3: weights gathered layer by layer for every token, against weights gathered once.

    python -m cl_dist.benchmarks.gathered_generation [--hidden 512] [--layers 8] [--batch 8] [--new-tokens 32] \
        [--lora] [--runs 5] [--processes 2]

Ranks on this machine generate with the same random Llama in alternate rounds. The time with gathered weights includes
gathering and releasing them, for every batch anew: a task with several batches gathers once for all of them. Prints
JSON: the seconds of the slowest rank in each round, the ratios within the rounds, and whether all answers were equal.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from contextlib import nullcontext
from statistics import median
from typing import Any

from cl_dist.benchmarks.ranks import measure_on_ranks


def main() -> None:
    """Start the ranks and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 512), ("layers", 8), ("batch", 8), ("prompt", 64), ("new-tokens", 32), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    found = measure_on_ranks("cl_dist.benchmarks.gathered_generation:measure", vars(options), options.processes)
    print(json.dumps({"settings": vars(options), **found}, indent=1))


def measure(**settings: Any) -> dict[str, Any]:
    """Generate in alternate rounds (collective); `settings` are the command's options."""
    import torch

    from cl_dist.evaluation.inference import evaluating, generate
    from cl_dist.sharding import gathered

    task, rank = argparse.Namespace(**settings), torch.distributed.get_rank()
    engine, tokenizer, vocabulary = _engine(task)
    draw = random.Random(rank)
    prompts = [[draw.randrange(3, vocabulary) for _ in range(task.prompt)] for _ in range(task.batch)]
    seconds: dict[str, list[float]] = {"sharded": [], "gathered": []}
    answers = set()
    for number in range(task.runs + 1):  # the first round warms up
        for way in sorted(seconds, reverse=bool(number % 2)):
            torch.distributed.barrier()
            began = time.perf_counter()
            with evaluating(engine.module), gathered(engine) if way == "gathered" else nullcontext():
                found = generate(
                    engine.module, tokenizer, prompts, 0, task.new_tokens, synced=way == "sharded", stops=[-1]
                )
            spent = torch.tensor(time.perf_counter() - began)
            torch.distributed.all_reduce(spent, torch.distributed.ReduceOp.MAX)
            answers.add(json.dumps([each.ids for each in found]))
            if number:
                seconds[way].append(round(spent.item(), 3))
    same = torch.tensor(len(answers) == 1, dtype=torch.int32)
    torch.distributed.all_reduce(same, torch.distributed.ReduceOp.MIN)
    ratios = [a / b for a, b in zip(seconds["sharded"], seconds["gathered"], strict=True)]
    return {
        "seconds": seconds,
        "sharded_over_gathered": {
            "median": round(median(ratios), 2),
            "minimum": round(min(ratios), 2),
            "maximum": round(max(ratios), 2),
        },
        "same_answers": bool(same.item()),
    }


def _engine(task: argparse.Namespace) -> tuple[Any, Any, int]:
    """A stage 3 engine around a Llama with random weights."""
    import deepspeed
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from cl_dist.config.schema import LoraConfig
    from cl_dist.models.builtin import byte_tokenizer
    from cl_dist.models.lora import add_lora

    torch.manual_seed(0)
    vocabulary = 8192
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=task.hidden,
            intermediate_size=task.hidden * 11 // 4,
            num_hidden_layers=task.layers,
            num_attention_heads=task.hidden // 64,
            num_key_value_heads=task.hidden // 64,
        )
    )
    if task.lora:
        model = add_lora(model, LoraConfig(r=8), "causal_lm", 0)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 10_000},
    }
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.SGD(trained, lr=0.0), config=settings)[0]
    return engine, byte_tokenizer("decoder"), vocabulary


if __name__ == "__main__":
    main()
