"""Data, base model or tokenizer replaced between a kill and --resume; and a project that was moved in between."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from cl_dist.config.schema import ModelConfig
from cl_dist.state.manifest import Manifest
from tests.ranks import REPOSITORY, free_port, rank_environment
from tests.recipes import write_recipe
from tests.state.test_atomic import can_mount
from tests.tasks.data import as_lines, records, write_lines
from tests.zygote import Outcome, Zygote

SAMPLES = 24


def write_data(folder: Path, tag: str = "", count: int = SAMPLES) -> None:
    write_lines(folder / "train.jsonl", as_lines(records("input", "output", count, tag)))
    write_lines(folder / "test.jsonl", as_lines(records("input", "output", 6, tag)))


def write_base(folder: Path, seed: int) -> None:
    """A tiny Llama with random weights."""
    import torch

    from cl_dist.models.export import export_model
    from cl_dist.models.load import load_model

    model = ModelConfig(name_or_path="builtin:llama-tiny")
    loaded = load_model(model, 2, zero3_config=None, dtype=torch.float32, seed=seed, cache_dir=folder)
    folder.mkdir(parents=True, exist_ok=True)
    export_model(loaded.model, loaded.tokenizer, folder, dict(loaded.model.named_parameters()))


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Restore a file or folder after the block."""
    kept = path.with_name(f"{path.name}.kept")
    (shutil.copytree if path.is_dir() else shutil.copy2)(path, kept)
    try:
        yield
    finally:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        kept.rename(path)


def write_project(folder: Path) -> Path:
    """Two tasks of six steps, LoRA on a model in the project's folder; data paths are relative to the recipe."""
    for name in ("one", "two"):
        write_data(folder / "data" / name, name)
    write_base(folder / "base", seed=1)
    tasks = [{"name": name, "format": "jsonl", "path": f"data/{name}"} for name in ("one", "two")]
    recipe = write_recipe(
        folder,
        model={"name_or_path": str(folder / "base"), "lora": {"r": 2}},
        stream={"tasks": tasks, "max_train_samples": SAMPLES},
        checkpoint={"every_steps": 2},
        launch={"processes": 1},
    )
    return recipe


def moved(before: Path, after: Path) -> Path:
    """Rename the project, and update the absolute paths in the recipe, as its user would."""
    before.rename(after)
    path = after / "recipe.yaml"
    path.write_text(path.read_text().replace(str(before), str(after)))
    return path


def resumed(zygote: Zygote, recipe: Path) -> Outcome:
    return zygote.run(["run", str(recipe), "--resume", "--debug"], recipe.parent / "out")


def test_a_run_goes_on_with_what_it_was_given(zygote: Zygote, tmp_path: Path) -> None:
    project = tmp_path / "before"
    recipe = write_project(project)
    fault = {"moment": "step", "on_rank": 0, "count": 10}  # in the second task, past a checkpoint
    outcome = zygote.run(["run", str(recipe)], project / "out", fault=fault)
    assert outcome.codes == [-9], outcome.output
    inputs = json.loads((project / "run" / "manifest.json").read_text())["inputs"]
    assert {"data", "base_model", "tokenizer"} <= inputs.keys()
    assert inputs["data"]["one"]["train"]["samples"] == SAMPLES
    assert set(inputs["base_model"]["files"]) >= {"config.json", "model.safetensors"}

    def refused(message: str) -> None:
        outcome = resumed(zygote, recipe)
        assert outcome.codes == [2], outcome.output
        assert message in outcome.output[0]
        assert "restore the old ones, or start anew with --fresh or another output_dir" in outcome.output[0]
        assert (project / "run" / "manifest.json").read_bytes() == before

    before = (project / "run" / "manifest.json").read_bytes()
    past = project / "data" / "one"
    with replaced(past):
        write_data(past, "other", count=SAMPLES - 4)
        changed = f"changed: {SAMPLES} samples before, {SAMPLES - 4} now"
        refused(f"the training data of task 'one' ({past / 'train.jsonl'}) {changed}")
    with replaced(project / "base"):
        write_base(project / "base", seed=2)
        refused(f"the base model changed ({project / 'base'}: model.safetensors)")
    with replaced(project / "base" / "tokenizer_config.json"):
        settings = json.loads((project / "base" / "tokenizer_config.json").read_text())
        (project / "base" / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "x"}))
        refused(f"the tokenizer changed ({project / 'base'}: tokenizer_config.json)")

    # Neither the path nor unused files matter.
    recipe = moved(project, tmp_path / "after")
    project = tmp_path / "after"
    write_data(project / "data" / "one", "one", count=SAMPLES + 8)
    outcome = resumed(zygote, recipe)
    assert outcome.codes == [0], outcome.output
    assert "resuming task two after step" in outcome.output[0]
    manifest = Manifest.read(project / "run" / "manifest.json")
    assert (manifest.status, manifest.restarts) == ("finished", 1)

    # The run folder's copy of the recipe has the old paths.
    project.rename(tmp_path / "again")
    project = tmp_path / "again"
    outcome = zygote.run(["eval", str(project / "run")], project / "out")
    assert outcome.codes == [0], outcome.output
    assert "input has changed since the run" not in outcome.output[0]
    scores = json.loads((project / "run" / "tasks" / "02-two" / "evaluation.json").read_text())
    assert list(scores.values()) == list(manifest.accuracy_matrix[-1])
    write_data(project / "data" / "one", "other")
    outcome = zygote.run(["eval", str(project / "run")], project / "out")
    assert outcome.codes == [0], outcome.output
    assert "input has changed since the run: the training data of task 'one'" in outcome.output[0]

    if can_mount():
        check_read_only(project, scores)


def check_read_only(project: Path, scores: dict[str, float]) -> None:
    """eval shows what it finds and says that it is not stored; report says so before it draws."""
    run, out = project / "run", project / "out"
    shutil.rmtree(run / "tasks" / "02-two" / "evaluation")
    mount = f'mount --bind "{run}" "{run}" && mount -o remount,bind,ro "{run}" && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", sys.executable, "-m", "cl_dist"]
    environment = {**rank_environment(0, 1, free_port()), "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([*command, "eval", str(run)], capture_output=True, text=True, cwd=out, env=environment)
    assert done.returncode == 0, done.stderr
    assert "02-two is not writable: scores and predictions are shown, but not stored" in done.stdout
    assert "two: " in done.stdout
    assert not (run / "tasks" / "02-two" / "evaluation").exists()
    done = subprocess.run([*command, "report", str(run)], capture_output=True, text=True, cwd=out)
    assert done.returncode == 2, done.stderr
    assert "Read-only file system; use --out DIR to write it elsewhere" in done.stderr


@pytest.mark.slow
def test_a_run_of_an_earlier_release_says_that_it_is_not_compared(zygote: Zygote, tmp_path: Path) -> None:
    recipe = write_project(tmp_path)
    fault = {"moment": "step", "on_rank": 0, "count": 4}
    assert zygote.run(["run", str(recipe)], tmp_path / "out", fault=fault).codes == [-9]
    manifest = tmp_path / "run" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["inputs"]
    manifest.write_text(json.dumps(content))
    content = yaml.safe_load(recipe.read_text())
    content["stream"]["tasks"][0]["path"] = "./data/one"
    elsewhere = tmp_path / "elsewhere.yaml"
    elsewhere.write_text(yaml.safe_dump(content))
    outcome = resumed(zygote, elsewhere)
    assert outcome.codes == [2], "only the paths of its inputs are known"
    assert "stream.tasks[0].path: 'data/one' in the run, './data/one' now" in outcome.output[0]
    assert "perhaps with other defaults: set the run's values with --set" in outcome.output[0]
    outcome = resumed(zygote, recipe)
    assert outcome.codes == [0], outcome.output
    assert "recorded no digests of its inputs: data, base model and tokenizer cannot be compared" in outcome.output[0]
    assert Manifest.read(manifest).inputs is not None


@pytest.mark.skipif(not can_mount(), reason="mounting a small disk in a user namespace is not allowed here")
def test_a_full_disk_under_a_report_is_told_with_what_helps(tmp_path: Path) -> None:
    from tests.report.runs import write_run

    run = write_run(tmp_path / "run", ["a", "b"], 2).path
    (tmp_path / "disk").mkdir()
    mount = 'mount -t tmpfs -o size=16k tmpfs disk && exec "$@"'
    command = ["unshare", "-Urm", "sh", "-c", mount, "sh", sys.executable, "-m", "cl_dist", "report", str(run)]
    environment = {"PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "--out", "disk"], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=120
    )
    assert done.returncode == 1, done.stderr
    assert "no space left on the disk of disk/" in done.stderr
    assert "try again; use --out DIR to write it elsewhere" in done.stderr
    assert "--resume" not in done.stderr
