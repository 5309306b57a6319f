"""Memory and time of tokenised data: Python lists on every rank, against arrays in a file that the ranks share.

    python -m cl_dist.benchmarks.tokenised_data [--tasks 10] [--samples 1000] [--words 200] [--ranks 2]

Every rank is a process that loads all tasks; they start together. `lists` keeps `Encoded` objects, as every rank once
did. `first` starts with an empty cache, so that one rank tokenises and the others wait; `second` finds the files. Bytes
per token: `own` is memory of this rank alone; `shared` are pages of the files, in memory once per machine, after the
rank has looked up every sample. The tokenizer has 32,000 words, so ids are as large as Llama 2's. Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

VOCABULARY = 32_000
MODES = ("lists", "first", "second")


def main() -> None:
    """Measure all modes in turn and print the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", type=int, default=10)
    parser.add_argument("--samples", type=int, default=1000, help="per task")
    parser.add_argument("--words", type=int, default=200, help="per prompt; an answer has a tenth of it")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        print(json.dumps(measure(options, *options.rank)))
        return
    found: dict[str, list[list[dict[str, float]]]] = {mode: [] for mode in MODES}
    for _ in range(options.runs):
        with tempfile.TemporaryDirectory() as folder:
            for mode in MODES:
                found[mode].append(on_ranks(options, mode, folder))
    print(json.dumps({"settings": vars(options), **{mode: summary(runs) for mode, runs in found.items()}}, indent=1))


def on_ranks(options: argparse.Namespace, mode: str, folder: str) -> list[dict[str, float]]:
    """Start the ranks and return what each of them measured."""
    command = [sys.executable, "-m", "cl_dist.benchmarks.tokenised_data", "--rank", mode, folder]
    command += [f"--{name}={getattr(options, name)}" for name in ("tasks", "samples", "words")]
    ranks = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(options.ranks)]
    return [json.loads(rank.communicate()[0]) for rank in ranks]


def summary(runs: list[list[dict[str, float]]]) -> dict[str, Any]:
    """The slowest rank's seconds in each run, and medians over all runs and ranks."""
    seconds = [round(max(rank["seconds"] for rank in ranks), 3) for ranks in runs]
    everyone = [rank for ranks in runs for rank in ranks]
    values = {name: round(median(rank[name] for rank in everyone), 2) for name in ("own", "shared", "tokens")}
    return {"seconds": seconds, **values}


def measure(options: argparse.Namespace, mode: str, folder: str) -> dict[str, float]:
    """On one rank: load all tasks, then look up every sample."""
    from cl_dist.config.schema import TrainConfig
    from cl_dist.state.token_cache import TokenCache
    from cl_dist.tasks.encode import Encoder
    from cl_dist.tasks.tokenised import TokenisedData

    tasks, tokenizer = made_up_tasks(options), word_tokenizer()
    encoder = Encoder(tokenizer, "causal_lm", TrainConfig(max_length=4096, max_target_length=512), ())
    list(encoder.each_prompt(tasks[0]))  # the tokenizer's own caches
    before, began = resident(), time.perf_counter()
    data = TokenisedData(encoder, TokenCache(Path(folder)))
    kept: Any = [list(encoder.each_training_sample(task)) if mode == "lists" else data.train(task) for task in tasks]
    seconds = time.perf_counter() - began
    tokens = sum(len(sample.input_ids) for samples in kept for sample in samples)
    own, shared = (now - then for now, then in zip(resident(), before, strict=True))
    return {"seconds": seconds, "tokens": tokens, "own": own / tokens, "shared": shared / tokens}


def made_up_tasks(options: argparse.Namespace) -> list[Any]:
    """Tasks of random words."""
    from cl_dist.tasks.types import Example, Task

    draw = random.Random(0)

    def text(words: int) -> str:
        return " ".join(f"w{draw.randrange(VOCABULARY)}" for _ in range(words))

    def examples() -> list[Example]:
        return [Example(text(options.words), text(options.words // 10)) for _ in range(options.samples)]

    return [Task(f"task-{number}", "generation", examples(), []) for number in range(options.tasks)]


def word_tokenizer() -> Any:
    """A token for each word."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(WordLevel({"</s>": 0} | {f"w{number}": number + 1 for number in range(VOCABULARY)}, "</s>"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="</s>")


def resident() -> tuple[int, int]:
    """Bytes in memory: this process's own, and pages of files."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    own, shared = (int(re.search(rf"{name}:\s+(\d+)", status)[1]) << 10 for name in ("RssAnon", "RssFile"))  # type: ignore[index]
    return own, shared


if __name__ == "__main__":
    main()
