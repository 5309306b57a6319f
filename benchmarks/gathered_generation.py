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
import os
import random
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from cl_dist.errors import ClDistError
from cl_dist.launch.child import die_with_launcher, python_command, report_failure
from cl_dist.launch.local import launch
from cl_dist.process_end import end_with


def main() -> None:
    """Start the ranks and print what they measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("hidden", 512), ("layers", 8), ("batch", 8), ("prompt", 64), ("new-tokens", 32), ("runs", 5)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--lora", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        task = {**vars(options), "result": str(Path(folder, "result.json"))}
        command = [*python_command("cl_dist.benchmarks.gathered_generation:program"), json.dumps(task)]
        ending = launch(command, options.processes, dict(os.environ))
        if ending.exit_code != 0:
            raise ClDistError("\n".join([*ending.output, str(ending.message)]))
        print(json.dumps({"settings": vars(options), **json.loads(Path(task["result"]).read_text())}, indent=1))


def program() -> None:
    """Be one of the ranks."""
    end_with(lambda: _measured(argparse.Namespace(**json.loads(sys.argv[1]))))


def _measured(task: argparse.Namespace) -> int:
    os.dup2(2, 1)  # standard output is reserved for the JSON document
    die_with_launcher(os.environ)
    try:
        measure(task)
    except ClDistError as error:
        report_failure(os.environ, error.exit_code, str(error))
        return error.exit_code
    return 0


def measure(task: argparse.Namespace) -> None:
    """Generate in alternate rounds; rank 0 writes the result."""
    import torch

    from cl_dist.engine.distributed import join, leave, quiet_libraries
    from cl_dist.evaluation.inference import evaluating, generate
    from cl_dist.sharding import gathered

    rank = join(600.0).rank
    quiet_libraries(rank)
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
    if rank == 0:
        result: dict[str, Any] = {
            "seconds": seconds,
            "sharded_over_gathered": {
                "median": round(median(ratios), 2),
                "minimum": round(min(ratios), 2),
                "maximum": round(max(ratios), 2),
            },
            "same_answers": bool(same.item()),
        }
        Path(task.result).write_text(json.dumps(result), encoding="utf-8")
    leave()


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
