"""`cl-dist run`; tests/runs, tests/faults and tests/distributed have whole runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cl_dist import machine
from cl_dist.cli.ranks import with_ranks
from cl_dist.config.load import load_recipe
from cl_dist.machine import TorchBuild, cpu_device
from tests.cli.conftest import Command
from tests.driver import answers, driver_folder


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with eight GPUs, whose driver works."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(machine, "DRIVER_LIBRARY", str(driver_folder() / "libcuda.so.1"))
    for name, value in answers(gpus=8).items():
        monkeypatch.setenv(name, value)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch could use the GPUs")
def test_without_a_usable_gpu_nothing_is_started(command: Command, eight_gpus: None) -> None:
    code, output, error = command("run", "quickstart", "--set=launch.device=cuda", "--set=launch.processes=auto")
    assert (code, output) == (2, "")
    assert error.startswith("cl-dist: error: launch.device: cuda: this machine has 8 × NVIDIA H100 80GB HBM3, but the")


def test_auto_counts_the_gpus(command: Command, eight_gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "installed_torch", lambda: TorchBuild("2.13.0+cu130", "13.0"))
    recipe = with_ranks(load_recipe("quickstart", ["launch.processes=auto"])[0])
    assert recipe.launch.processes == 8
    for name, value in {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert with_ranks(load_recipe("quickstart", ["launch.processes=auto"])[0]).launch.processes == 4


def test_a_whole_run_and_its_status(command: Command, tmp_path: Path) -> None:
    changes = ["train.max_steps_per_task=2", "stream.tasks=[{name: spring, format: builtin}]"]
    changes += ["stream.max_eval_samples=8", "launch.processes=2", "launch.device=cpu", "output_dir=here"]
    code, output, error = command("run", "quickstart", *(f"--set={change}" for change in changes))
    assert code == 0, error
    lines = [line for line in output.splitlines() if not line.startswith("  still ")]
    assert lines[:12] == [
        "quickstart: builtin:llama-tiny, 1 task, sequential",
        "2 ranks on the CPU, output in here",
        "checking data and model",
        "starting 2 ranks",
        "importing torch and transformers",
        "importing deepspeed, meeting the other ranks",
        f"2 ranks on the CPU: {cpu_device().describe()}",
        "reading the data",
        "loading the model builtin:llama-tiny",
        "checking the data: spring 256 samples",
        "building the engine: ZeRO stage 2, two trial batches",
        "1 task on 2 ranks: spring",
    ]
    assert "step 2/2  loss " in output
    assert "  evaluating spring: 8 samples" in lines
    assert all(character == "\n" or character.isprintable() for character in output)
    assert "average performance (AP)" in output
    assert output.splitlines()[-4:] == [
        "model after the last task  here/tasks/01-spring/model (Hugging Face format)",
        "report with figures        cl-dist report here",
        "score the model again      cl-dist eval here",
        "model card, Hub, vLLM      cl-dist export here --out DIR",
    ]
    metrics = json.loads((tmp_path / "here/metrics.json").read_text())
    assert len(metrics["accuracy_matrix"]) == 2
    assert metrics["device"] == cpu_device().to_dict()
    log = [json.loads(line) for line in (tmp_path / "here/log.jsonl").read_text().splitlines()]
    assert {"ranks": 2, **metrics["device"]}.items() <= next(line for line in log if line["event"] == "device").items()
    assert command("status", "here")[1].startswith("status      finished\ntasks done  1 of 1\n")
    assert command("report", "here")[1].endswith("wrote here/report/index.html\n")
    assert command("run", "quickstart", "--set=output_dir=here")[0] == 2
