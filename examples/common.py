"""What the examples share: two tasks, a model, and ranks. With --tiny everything fits any CPU and takes seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

TINY = "--tiny" in sys.argv
TASKS = ("billing", "shipping")


def model_and_tokenizer():
    """A model with random weights and a tokenizer of bytes (--tiny), or SmolLM2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if TINY:
        from cl_dist.models.builtin import builtin_config, byte_tokenizer

        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(builtin_config("builtin:llama-tiny")), byte_tokenizer("decoder")
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    return AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32), AutoTokenizer.from_pretrained(name)


def records(task):
    """A task's records: customers' messages and what they are about."""
    lines = Path(__file__).with_name(f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[: 16 if TINY else None]]


def chats(task):
    """A task's conversations, as a data set for SFTTrainer."""
    from datasets import Dataset

    asked = [(each["input"], each["output"]) for each in records(task)]
    pairs = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in asked]
    return Dataset.from_list([{"messages": pair} for pair in pairs])


def encoded(task, tokenizer):
    """A task's texts as token ids with labels, for any loop."""
    texts = [f"{each['input']} {each['output']}{tokenizer.eos_token}" for each in records(task)]
    return [{"input_ids": ids, "labels": ids} for ids in tokenizer(texts)["input_ids"]]


def batches(task, tokenizer, size=4, rank=0, ranks=1):
    """A rank's padded batches of a task."""
    from transformers import DataCollatorForSeq2Seq

    pad, samples = DataCollatorForSeq2Seq(tokenizer), encoded(task, tokenizer)[rank::ranks]
    return [pad(samples[i : i + size]) for i in range(0, len(samples), size)]


def start(main, ranks=1):
    """Run `main`, as a rank if a launcher such as torchrun has started this one; else start the ranks first."""
    if ranks > 1 and "RANK" not in os.environ:
        environment = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29655"}
        environment |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(ranks), **os.environ}
        numbers = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        started = [subprocess.Popen([sys.executable, *sys.argv], env={**environment, **each}) for each in numbers]
        sys.exit(max(abs(each.wait()) for each in started))
    main()
    if os.environ.get("RANK", "0") == "0":
        print("ok", flush=True)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def meet():
    """Join the other ranks, with NCCL on GPUs and Gloo on CPUs."""
    from cl_dist.engine.distributed import join

    join(timeout_seconds=600)


def deepspeed_on_cpu():
    """Let accelerate and Trainer run DeepSpeed on CPUs too, for --tiny: by themselves they do so on GPUs only."""
    if torch.cuda.is_available():
        return
    from accelerate import PartialState
    from accelerate.state import DistributedType

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    meet()
    PartialState._prepare_backend = lambda self, *_: ("gloo", DistributedType.MULTI_CPU)


def zero(stage):
    """DeepSpeed's settings for a Trainer."""
    return {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {"stage": stage, "overlap_comm": False, "reduce_bucket_size": 20_000_000},
    }
