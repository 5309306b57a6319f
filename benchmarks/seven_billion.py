#!/usr/bin/env python3
r"""Builds, steps, saves, kills, resumes and exports a model of Llama2-7B's exact shape on two CPU ranks under ZeRO-3.

The weights are random, drawn once into bfloat16 safetensors shards (13.5 GB in --out). Every phase is one command of a
few minutes, and keeps its numbers in --out; `report` collects them.

Usage:
    for phase in weights whole killed resumed report; do
        python benchmarks/seven_billion.py --out scratch/7b --method migu --phase $phase
    done
    python benchmarks/seven_billion.py --out scratch/7b --phase clean

| phase | what it does |
|---|---|
| weights | writes model, tokenizer, data |
| whole | trains both tasks without interruption |
| killed | starts the same run again, and kills all its processes (SIGKILL) during a step of the second task |
| resumed | resumes it to its end |
| report | compares the two runs' adapters bit for bit; prints the numbers, writes --json |
| clean | deletes --out |

--scale small is a model of the same kind that takes seconds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from cl_dist.launch.child import PROGRAM, python_command

PHASES = ("weights", "whole", "killed", "resumed", "report", "clean")
SHAPES: dict[str, dict[str, int]] = {
    "7b": {"hidden": 4096, "intermediate": 11008, "layers": 32, "heads": 32, "vocabulary": 32000},
    "small": {"hidden": 64, "intermediate": 172, "layers": 2, "heads": 4, "vocabulary": 320},
}
RANKS = 2
TASKS = ("spring", "summer")
LABELS = ["north", "south", "east", "west"]
SAMPLES = {"train": 24, "test": 2}
SEED = 7
STD = 0.02
BLOCK = 4_194_301
"""Numbers that are drawn; every tensor repeats them from a place of its own. A prime, so that no two rows of a matrix
are equal."""
SHARD_BYTES = 1 << 30
"""Bytes of a weight file, unless a single tensor has more."""
POLL_SECONDS = 0.25
PAGES = {"Rss": "rss_bytes", "Pss": "pss_bytes", "Anonymous": "anonymous_bytes"}
"""Fields of /proc/<pid>/smaps_rollup. Pss shares a page that several processes map among them, so their sum counts it
once. Rss minus Anonymous are pages of files, which the kernel takes back when memory is short."""


def main() -> None:
    """Run one phase."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="scratch folder")
    parser.add_argument("--phase", required=True, choices=PHASES)
    parser.add_argument("--method", default="migu", choices=("migu", "kif"))
    parser.add_argument("--scale", default="7b", choices=tuple(SHAPES))
    parser.add_argument("--steps", type=int, default=2, help="optimiser steps per task, at least 2")
    parser.add_argument("--delay", type=float, default=3.0, help="seconds into the step in which the run is killed")
    parser.add_argument("--json", type=Path, help="where `report` writes all numbers")
    options = parser.parse_args()
    {
        "weights": write_inputs,
        "whole": train_whole,
        "killed": train_and_kill,
        "resumed": resume,
        "report": report,
        "clean": lambda options: shutil.rmtree(options.out),
    }[options.phase](options)


def write_inputs(options: argparse.Namespace) -> None:
    """Phase `weights`."""
    started = time.monotonic()
    folder = options.out / "model"
    folder.mkdir(parents=True)
    size = write_model(folder, SHAPES[options.scale])
    write_data(options.out / "data")
    numbers = {"seconds": time.monotonic() - started, "bytes": size}
    _numbers(options, "weights").write_text(json.dumps(numbers))
    print(json.dumps(numbers))


def write_model(folder: Path, shape: dict[str, int]) -> int:
    """Write configuration, tokenizer and weights in Hugging Face format; return the bytes of the weights."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from cl_dist.models.builtin import byte_tokenizer

    tokenizer = byte_tokenizer("decoder")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: weight.shape for name, weight in LlamaForCausalLM(config).state_dict().items()}

    generator = torch.Generator().manual_seed(SEED)
    block = torch.empty(BLOCK).normal_(0.0, STD, generator=generator).bfloat16()
    shards = _shards({name: 2 * size.numel() for name, size in shapes.items()})
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: _weight(name, shapes[name], block) for name in names}, folder / file, {"format": "pt"})
        places.update(dict.fromkeys(names, file))
    size = sum(2 * each.numel() for each in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return size


def _shards(sizes: dict[str, int]) -> list[list[str]]:
    """Divide tensors, in their order, into files of at most SHARD_BYTES or one tensor."""
    shards: list[list[str]] = [[]]
    full = 0
    for name, size in sizes.items():
        if shards[-1] and full + size > SHARD_BYTES:
            shards.append([])
            full = 0
        shards[-1].append(name)
        full += size
    return shards


def _weight(name: str, shape: Any, block: Any) -> Any:
    """A tensor: ones for a norm, otherwise the block's numbers, repeated from a place that its name determines."""
    import torch

    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % BLOCK
    flat = torch.empty(shape.numel(), dtype=torch.bfloat16)
    done = 0
    while done < flat.numel():
        piece = block[start : start + flat.numel() - done]
        flat[done : done + len(piece)] = piece
        done, start = done + len(piece), 0
    return flat.view(shape)


def write_data(folder: Path) -> None:
    """Write the first samples of two generated tasks, as JSON Lines."""
    from cl_dist.tasks.formats.builtin import Builtin
    from cl_dist.tasks.formats.format import Source

    for task in TASKS:
        raw = Builtin().read(Source(name=task, format="builtin", recipe_dir=Path()))
        (folder / task).mkdir(parents=True)
        for name, split in (("train", raw.train), ("test", raw.evaluation)):
            lines = [{"input": each.prompt, "output": each.answer} for each in split.examples[: SAMPLES[name]]]
            (folder / task / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def recipe(options: argparse.Namespace, run: str) -> dict[str, Any]:
    """The recipe of one run: adapters of rank 8 on every linear layer, sequences of some 50 tokens."""
    out = options.out.resolve()
    tasks = [{"name": name, "format": "jsonl", "path": str(out / "data" / name), "labels": LABELS} for name in TASKS]
    return {
        "model": {"name_or_path": str(out / "model"), "lora": {"r": 8, "alpha": 16.0}},
        "stream": {"tasks": tasks},
        "method": {"name": options.method},
        "train": {"max_steps_per_task": options.steps, "micro_batch_size": 1, "max_length": 64, "dtype": "bfloat16"},
        "zero": {"stage": 3},
        "launch": {"processes": RANKS},
        # One token per answer: a forward pass gathers the whole model once.
        "eval": {"before_training": False, "tasks": "seen", "mode": "generate", "max_new_tokens": 1},
        "checkpoint": {"every_steps": 1},
        "output_dir": str(out / f"{options.method}-{run}"),
    }


def train_whole(options: argparse.Namespace) -> None:
    """Phase `whole`."""
    note(options, "whole", Run(options, "whole").to_the_end())


def train_and_kill(options: argparse.Namespace) -> None:
    """Phase `killed`: SIGKILL for all processes, once the second task's first step is saved and the next has begun."""
    run = Run(options, "killed")
    saved = {"event": "saved", "task": TASKS[1], "step": 1}
    numbers = run.until(lambda: any(saved.items() <= event.items() for event in run.events()))
    time.sleep(options.delay)
    run.kill()
    manifest = json.loads((run.folder / "manifest.json").read_text())
    if manifest["status"] == "finished" or manifest["completed"] != 1:
        sys.exit(f"the run was not in its second task when it was killed: {manifest['status']}; give more --steps")
    note(options, "killed", {**numbers, "checkpoints": manifest["checkpoints"]})


def resume(options: argparse.Namespace) -> None:
    """Phase `resumed`."""
    note(options, "resumed", Run(options, "killed", "--resume").to_the_end())


class Run:
    """A `cl-dist run` that is under way, in a session of its own, with its memory and phases watched.

    Args:
        options: The script's.
        name: Name of the run folder, after the method's.
        flags: Further options of the command.
    """

    def __init__(self, options: argparse.Namespace, name: str, *flags: str) -> None:
        settings = recipe(options, name)
        self.folder = Path(settings["output_dir"])
        file = options.out / f"{self.folder.name}.yaml"
        file.write_text(yaml.safe_dump(settings, sort_keys=False))
        self._known = len(self.events())
        self._log = (options.out / f"{self.folder.name}.log").open("ab")
        self._started, self._began = time.monotonic(), time.time()
        command = [*python_command(PROGRAM), "run", str(file), *flags]
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True, env=_environment()
        )
        self._memory = MemoryWatch(self._process.pid)
        self._phases: dict[str, float] = {}

    def events(self) -> list[dict[str, Any]]:
        """The records of the run's log so far."""
        with suppress(OSError):
            lines = (self.folder / "log.jsonl").read_text().splitlines()
            return [json.loads(line) for line in lines if line.endswith("}")]
        return []

    def to_the_end(self) -> dict[str, Any]:
        """Wait for the run, which must succeed, and return what it took."""
        numbers = self.until(lambda: False)
        if self._process.wait() != 0:
            sys.exit(f"{json.dumps(numbers)}\nthe run failed; see {self._log.name}")
        return {**numbers, "bytes_of_state": _state_bytes(self.folder), "metrics": _metrics(self.folder)}

    def until(self, reached: Callable[[], bool]) -> dict[str, Any]:
        """Watch until `reached` or the end of the run; return seconds, memory and the new records of the log."""
        while self._process.poll() is None and not reached():
            before, phase = time.monotonic(), self._phase()
            self._memory.look(phase)
            time.sleep(POLL_SECONDS)
            self._phases[phase] = self._phases.get(phase, 0.0) + time.monotonic() - before
        events = self.events()[self._known :]
        return {
            "seconds": time.monotonic() - self._started,
            "seconds_by_phase": self._phases,
            "step_seconds": [event["seconds"] for event in events if event["event"] == "step"],
            "save_seconds": [event["seconds"] for event in events if event["event"] == "saved"],
            **self._memory.peaks(),
        }

    def kill(self) -> None:
        """Kill every process of the run at once, and wait until none is left."""
        everyone = list(descendants(self._process.pid))
        for process in (self._process.pid, *everyone):
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        self._process.wait()
        while any(_is_running(process) for process in everyone):
            time.sleep(0.05)

    def _phase(self) -> str:
        """What rank 0 says it is doing, up to five seconds late."""
        file = self.folder / "logs" / ".heartbeat-rank0.json"
        with suppress(OSError, ValueError, KeyError):
            if file.stat().st_mtime >= self._began:  # not one that a killed run has left behind
                phase: str = json.loads(file.read_text())["phase"]
                return re.sub(r"(meeting|training|evaluating|saving the state).*", r"\1", phase)
        return "starting"


def _environment() -> dict[str, str]:
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


class MemoryWatch:
    """The highest memory of a process's descendants.

    Args:
        parent: Its id.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._ranks: dict[str, dict[str, int]] = {}
        self._highest: dict[str, int] = {}
        self._available = _available()
        self._least = self._available

    def look(self, phase: str) -> None:
        """Measure now, during `phase`."""
        total = 0
        for process in (self._parent, *descendants(self._parent)):
            found = _pages(process)
            total += found.get("pss_bytes", 0)
            if (rank := _rank(process)) is not None:
                highest = self._ranks.setdefault(rank, {})
                highest.update({name: max(value, highest.get(name, 0)) for name, value in found.items()})
        self._highest[phase] = max(self._highest.get(phase, 0), total)
        self._least = min(self._least, _available())

    def peaks(self) -> dict[str, Any]:
        """Per rank, of all processes together, and by how much the machine's available memory has dropped."""
        return {
            "peak_by_rank": dict(sorted(self._ranks.items())),
            "peak_pss_bytes_of_all": max(self._highest.values(), default=0),
            "peak_pss_bytes_by_phase": self._highest,
            "available_memory_dropped_bytes": self._available - self._least,
        }


def descendants(parent: int) -> Iterator[int]:
    """The processes that a process has started, and theirs."""
    with suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                yield child
                yield from descendants(child)


def _pages(process: int) -> dict[str, int]:
    """Bytes by kind; empty for a process that has ended."""
    with suppress(OSError):
        fields = (line.split() for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
        return {PAGES[name]: int(words[0]) * 1024 for key, *words in fields if (name := key.rstrip(":")) in PAGES}
    return {}


def _rank(process: int) -> str | None:
    """Its rank; None for a process that is none."""
    with suppress(OSError):
        variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
        return next((each[5:].decode() for each in variables if each.startswith(b"RANK=")), None)
    return None


def _available() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def _is_running(process: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _state_bytes(folder: Path) -> int:
    """Bytes of the state that the next task would start from."""
    return sum(path.stat().st_size for path in max(folder.glob("tasks/*/state")).iterdir())


def _metrics(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "metrics.json").read_text())
    return {key: found[key] for key in ("peak_memory_bytes", "timings", "tokens_per_second", "world_size")}


def report(options: argparse.Namespace) -> None:
    """Phase `report`: all numbers so far, and whether the interrupted run ended like the other one."""
    numbers = {method: _compared(options, method) for method in ("migu", "kif") if _numbers(options, method).exists()}
    document = {
        "scale": options.scale,
        "shape": SHAPES[options.scale],
        "ranks": RANKS,
        "machine": {"cores": os.cpu_count(), "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")},
        "weights": json.loads(_numbers(options, "weights").read_text()),
        "methods": numbers,
    }
    text = json.dumps(document, indent=2)
    if options.json is not None:
        options.json.write_text(f"{text}\n")
    print(text)


def _compared(options: argparse.Namespace, method: str) -> dict[str, Any]:
    noted: dict[str, Any] = json.loads(_numbers(options, method).read_text())
    if "whole" in noted and "resumed" in noted:
        noted["resumed_against_whole"] = {
            task: compare(*(options.out / f"{method}-{run}" / "tasks" / task / "model" for run in ("whole", "killed")))
            for task in (f"{number:02d}-{name}" for number, name in enumerate(TASKS, start=1))
        }
    return noted


def compare(first: Path, second: Path) -> dict[str, Any]:
    """How far the adapters in two folders agree."""
    import torch
    from safetensors.torch import load_file

    a, b = (load_file(folder / "adapter_model.safetensors") for folder in (first, second))
    equal = [name for name in a if torch.equal(a[name], b[name])]
    return {
        "tensors": len(a),
        "equal": len(equal),
        "largest_difference": max(float((a[name].float() - b[name].float()).abs().max()) for name in a),
        "largest_weight": max(float(a[name].float().abs().max()) for name in a),
        "same_names": a.keys() == b.keys(),
        "trained_elements": sum(tensor.numel() for tensor in a.values()),
    }


def note(options: argparse.Namespace, phase: str, numbers: dict[str, Any]) -> None:
    """Keep a phase's numbers, and print them."""
    file = _numbers(options, options.method)
    noted = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**noted, phase: numbers}))
    print(json.dumps({phase: numbers}, indent=2))


def _numbers(options: argparse.Namespace, name: str) -> Path:
    folder: Path = options.out
    return folder / f"{name}.json"


if __name__ == "__main__":
    main()
