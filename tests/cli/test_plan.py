"""`cl-dist plan`"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cl_dist.config.load import load_recipe
from tests.cli.conftest import Command

KEYS = {
    "fits": bool,
    "per_rank_bytes": dict,
    "step_seconds": float,
    "tokens_per_second": float,
    "hours": float,
    "wire_bytes_per_step": int,
    "checkpoint_bytes": int,
    "alternatives": list,
}
SMALL = ("plan", "quickstart", "--gpus-per-node", "2")


def test_json_has_what_scripts_read_and_the_recipe_is_written(command: Command, tmp_path: Path) -> None:
    changes = ("--set", "train.micro_batch_size=1", "--set", "train.gradient_accumulation=2")
    code, output, error = command(*SMALL, *changes, "--nodes", "2", "--json", "--dry-run", "--write", "mine.yaml")
    assert (code, error) == (0, "")
    found = json.loads(output)
    assert {key: type(found[key]) for key in KEYS} == KEYS
    assert found["fits"]
    assert found["predicted"]
    assert {"weights", "master", "moments"} <= set(found["per_rank_bytes"])
    assert all(isinstance(size, int) and size > 0 for size in found["per_rank_bytes"].values())
    assert min(found[key] for key in ("step_seconds", "tokens_per_second", "hours", "wire_bytes_per_step")) > 0
    assert found["dry_run"]["works"]
    assert found["dry_run"]["ranks"] == found["ranks"] == 4
    best = found["recommended"]
    assert best == found["alternatives"][0]

    recipe, _ = load_recipe(str(tmp_path / "mine.yaml"))
    train = recipe.train
    assert train.micro_batch_size * train.gradient_accumulation == 2
    assert recipe.launch.processes == 2
    assert train.micro_batch_size == best["micro_batch_size"]
    assert (recipe.zero.stage, recipe.zero.offload) == (best["stage"], best["offload"])
    lines = (tmp_path / "mine.yaml").read_text().splitlines()
    chosen = ("micro_batch_size", "gradient_accumulation", "activation_checkpointing", "stage", "offload", "processes")
    for setting in chosen:
        (place,) = (number for number, line in enumerate(lines) if line.startswith(f"  {setting}:"))
        assert lines[place - 1].startswith("  # "), setting
    code, _, error = command(*SMALL, "--write", "mine.yaml")
    assert (code, error) == (2, "cl-dist: error: --write: mine.yaml exists already; name a new file\n")


def test_the_text_keeps_within_the_terminal_and_says_what_would_not_work(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    changes = ("--set", "train.micro_batch_size=1", "--set", "stream.max_train_samples=9")
    code, output, error = command("plan", "quickstart", "--nodes", "4", "--dry-run", *changes)
    assert (code, error) == (1, "")
    assert max(map(len, output.splitlines())) <= 80
    for label in ("recipe", "on", "fits", "step", "throughput", "network", "checkpoint", "whole stream", "dry run"):
        assert f"\n{label} " in f"\n{output}"
    assert output.count("(predicted") >= 6
    assert "0.12 million parameters" in output
    assert "PROBLEM        data: 4 of 4 tasks have fewer samples than a global batch of 32" in output


def test_data_that_is_not_here_is_asked_for(command: Command) -> None:
    root = ("--set", "stream.tasks=[{name: a, format: tasl, path: nowhere}]", "--set", "train.micro_batch_size=1")
    code, output, _ = command(*SMALL, *root, "--json")
    found = json.loads(output)
    assert (code, found["hours"], found["data_is_here"]) == (0, None, False)
    assert "nowhere" in found["data"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("quickstart", "--device", "h1000"), "--device: there is no 'h1000'; allowed: h200, h100, a100-80, "),
        (("quickstart", "--nodes", "0"), "--nodes: 0 is not allowed; allowed: a whole number from 1"),
        (("quickstart", "--gpus-per-node", "-1"), "--gpus-per-node: -1 is not allowed"),
        (("quickstart", "--nodes", "90000"), "--nodes: 720000 ranks are too many to plan"),
        (("quickstart", "--samples", "0"), "--samples: 0 is not allowed"),
        (("quickstart", "--write", "plan.txt"), "--write: plan.txt is not a YAML file"),
        (("quickstart", "--write", "nowhere/plan.yaml"), "--write: there is no folder "),
        (("nothing.yaml",), "nothing.yaml: the recipe cannot be read"),
        (("quickstart", "--set", "zero.stage=7"), "zero.stage: "),
        (("quickstart", "--set", "model.name_or_path=EMPTY"), "EMPTY has no config.json"),
        (
            ("quickstart", "--set", "model.name_or_path=nobody/knows-this"),
            "nobody/knows-this is not on this machine, and a plan does not ask the network",
        ),
        (("quickstart", "--set", "model.name_or_path=a--b..c"), "a--b..c is not on this machine"),
        (
            ("quickstart", "--set", "train.dtype=bfloat16", "--device", "v100"),
            "train.dtype: NVIDIA V100 SXM2 32 GB has no",
        ),
        (("quickstart", "--set", "model.lora={target_modules: [nothing]}"), "model.lora.target_modules: "),
    ],
)
def test_bad_input_is_one_sentence(command: Command, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    code, output, error = command("plan", *(word.replace("EMPTY", str(empty)) for word in arguments))
    assert (code, output) == (2, "")
    assert len(error.splitlines()) == 1
    assert message.replace("EMPTY", str(empty)) in error
    assert list(tmp_path.iterdir()) == [empty]


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.3, 2.0, 6.0])
def test_ctrl_c_ends_it_with_one_line(tmp_path: Path, delay: float) -> None:
    arguments = ["plan", "llama2-7b-kif", "--nodes", "128", "--dry-run"]
    process = subprocess.Popen(
        [sys.executable, "-m", "cl_dist", *arguments],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert error.splitlines()[-1].startswith("cl-dist: interrupted: ")
    assert "Traceback" not in error
