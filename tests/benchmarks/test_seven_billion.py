"""The script that steps a model of Llama2-7B's shape; here with its small model."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from cl_dist.benchmarks import seven_billion
from cl_dist.config.load import load_recipe

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


def options(out: Path, **changes: Any) -> argparse.Namespace:
    """The script's options."""
    return argparse.Namespace(**{"out": out, "method": "migu", "scale": "small", "steps": 8, **changes})


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder after phase `weights`, with several small files of weights."""
    monkeypatch.setattr(seven_billion, "SHARD_BYTES", 50_000)
    seven_billion.write_inputs(options(tmp_path))
    return tmp_path


def test_the_large_model_has_the_shape_of_llama2_7b() -> None:
    shape = seven_billion.SHAPES["7b"]
    matrices = 4 * shape["hidden"] ** 2 + 3 * shape["hidden"] * shape["intermediate"]
    norms = (2 * shape["layers"] + 1) * shape["hidden"]
    assert shape["layers"] * matrices + norms + 2 * shape["vocabulary"] * shape["hidden"] == 6_738_415_616


def test_weights_come_in_shards_that_transformers_reads(inputs: Path) -> None:
    files = sorted((inputs / "model").glob("*.safetensors"))
    weights = {name: weight for file in files for name, weight in load_file(file).items()}
    assert len(files) > 4
    assert all(file.stat().st_size < 60_000 for file in files)
    assert json.loads((inputs / "weights.json").read_text())["bytes"] == sum(w.nbytes for w in weights.values())
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert isinstance(model, LlamaForCausalLM)
    assert model.dtype == torch.bfloat16
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    matrices = [weight.float() for weight in weights.values() if weight.dim() == 2]
    assert all(abs(float(matrix.std()) - seven_billion.STD) < 0.002 for matrix in matrices)
    assert len({matrix[0, :8].numpy().tobytes() for matrix in matrices}) == len(matrices)


@pytest.mark.parametrize("method", ["migu", "kif"])
def test_the_recipe_is_valid(inputs: Path, method: str) -> None:
    file = inputs / "recipe.yaml"
    file.write_text(json.dumps(seven_billion.recipe(options(inputs, method=method), "whole")))
    recipe, _ = load_recipe(str(file))
    assert (recipe.zero.stage, recipe.launch.processes, recipe.train.dtype) == (3, 2, "bfloat16")
    assert recipe.model.lora is not None
    tasks = [json.loads(line) for line in (inputs / "data" / "spring" / "train.jsonl").read_text().splitlines()]
    assert len(tasks) >= recipe.launch.processes * 8
    assert {task["output"] for task in tasks} <= set(seven_billion.LABELS)


def test_memory_of_ranks_is_measured(tmp_path: Path) -> None:
    program = "import time; data = bytearray(64 << 20); open('ready', 'w'); time.sleep(60)"
    parent = "import os, sys, subprocess as s; s.run([sys.executable, '-c', sys.argv[1]], env=os.environ|{'RANK': '3'})"
    process = subprocess.Popen([sys.executable, "-c", parent, program], cwd=tmp_path)
    try:
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        watch = seven_billion.MemoryWatch(process.pid)
        watch.look("training")
        found = watch.peaks()
    finally:
        for each in (*seven_billion.descendants(process.pid), process.pid):
            subprocess.run(["kill", str(each)], check=True)
        process.wait()
    (rank,) = found["peak_by_rank"]
    assert rank == "3"
    assert 64 * MIB < found["peak_by_rank"][rank]["anonymous_bytes"] < 84 * MIB
    assert found["peak_by_rank"][rank]["pss_bytes"] < found["peak_pss_bytes_of_all"] < 150 * MIB


def test_adapters_are_compared_bit_for_bit(tmp_path: Path) -> None:
    weights = {"a": torch.ones(3, 2), "b": torch.zeros(4)}
    for name, last in (("whole", 0.0), ("same", 0.0), ("other", 2.0**-20)):
        (tmp_path / name).mkdir()
        save_file({**weights, "b": torch.tensor([0.0, 0.0, 0.0, last])}, tmp_path / name / "adapter_model.safetensors")
    same = seven_billion.compare(tmp_path / "whole", tmp_path / "same")
    other = seven_billion.compare(tmp_path / "whole", tmp_path / "other")
    assert (same["tensors"], same["equal"], same["largest_difference"]) == (2, 2, 0.0)
    assert (other["tensors"], other["equal"], other["largest_difference"]) == (2, 1, 2.0**-20)
    assert same["trained_elements"] == 10


@pytest.mark.slow
@pytest.mark.parametrize("method", ["migu", "kif"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path, method: str) -> None:
    out, numbers = tmp_path / "out", tmp_path / "numbers.json"
    for phase in ("weights", "whole", "killed", "resumed", "report"):
        command = [sys.executable, "benchmarks/seven_billion.py", "--out", str(out), "--phase", phase]
        command += ["--method", method, "--scale", "small", "--steps", "8", "--delay", "0", "--json", str(numbers)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    found = json.loads(numbers.read_text())["methods"][method]
    assert found["killed"]["checkpoints"]
    assert len(found["whole"]["step_seconds"]) == 16
    assert 0 < len(found["resumed"]["step_seconds"]) < 8
    assert found["resumed"]["bytes_of_state"] > 10_000
    for compared in found["resumed_against_whole"].values():
        assert compared["same_names"]
        assert compared["equal"] == compared["tensors"] == 28
    for rank in ("0", "1"):
        assert found["whole"]["peak_by_rank"][rank]["anonymous_bytes"] > 100 * MIB
    assert sum(found["whole"]["seconds_by_phase"].values()) == pytest.approx(found["whole"]["seconds"], rel=0.2)
