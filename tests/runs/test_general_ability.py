"""lm-evaluation-harness on the live model of a run, with the test's own task files."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.harness_tasks import CHOICES, write_harness_tasks
from tests.recipes import write_recipe
from tests.zygote import Zygote, shared

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra general)")

DOCUMENTS = 15


@pytest.fixture(scope="module")
def zygote() -> Zygote:
    """The parent of all ranks, with the harness, whose import takes longer than the runs."""
    parent = shared()
    parent.load("lm_eval.evaluator", "lm_eval.models.huggingface")
    return parent


@pytest.fixture(scope="module")
def runs(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders: under both stages with general ability, and once without."""
    root = tmp_path_factory.mktemp("general")
    tasks = write_harness_tasks(root / "harness", DOCUMENTS)
    general = {"tasks": ["compass", "heading"], "include_path": str(tasks), "after": "all", "batch_size": 3}
    cases: dict[str, tuple[int, dict[str, Any]]] = {
        "zero2": (2, {"general": general}),
        "zero3": (3, {"general": general}),
        "without": (3, {}),
    }
    return {name: _run(zygote, root / name, stage, evaluation) for name, (stage, evaluation) in cases.items()}


def _run(zygote: Zygote, folder: Path, stage: int, evaluation: dict[str, Any]) -> Path:
    folder.mkdir()
    # A large eps, so that AdamW does not amplify rounding errors of tiny gradients.
    path = write_recipe(
        folder, zero={"stage": stage}, train={"eps": 1e-3, "epochs": 6, "learning_rate": 3e-3}, eval=evaluation
    )
    outcome = zygote.run(["run", str(path), "--debug"], folder, world=2, timeout=400.0)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    return folder / "run"


def _metrics(run: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((run / "metrics.json").read_text())
    return metrics


def _oracle(run: Path, task: str, harness: Path) -> tuple[float, float]:
    """Accuracy on compass and exact match on heading for the model saved after `task`, calculated by hand."""
    folder = run / "tasks" / task / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    compass = [json.loads(line) for line in (harness / "compass.jsonl").read_text().splitlines()]
    right = [_likeliest(model, tokenizer, each["question"]) == each["answer"] for each in compass]
    heading = [json.loads(line) for line in (harness / "heading.jsonl").read_text().splitlines()]
    exact = [_continued(model, tokenizer, each["question"]) == each["answer"] for each in heading]
    return sum(right) / len(right), sum(exact) / len(exact)


@torch.no_grad()
def _likeliest(model: Any, tokenizer: Any, question: str) -> int:
    context = tokenizer(question)["input_ids"]
    scores = []
    for choice in CHOICES:
        answer = tokenizer(f" {choice}", add_special_tokens=False)["input_ids"]
        logits = model(torch.tensor([[*context, *answer]])).logits[0].log_softmax(-1)
        scores.append(sum(logits[len(context) - 1 + i, token].item() for i, token in enumerate(answer)))
    return scores.index(max(scores))


@torch.no_grad()
def _continued(model: Any, tokenizer: Any, question: str) -> str:
    ids = tokenizer(question)["input_ids"]
    start = len(ids)
    for _ in range(6):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True)).partition("\n")[0]


@pytest.mark.parametrize("stage", ["zero2", "zero3"])
def test_scores_are_those_of_the_model_at_that_place(runs: dict[str, Path], stage: str) -> None:
    harness = runs[stage].parents[1] / "harness"
    general = _metrics(runs[stage])["general"]
    assert [entry["after"] for entry in general] == ["untouched", "spring", "summer"]
    for entry, task in zip(general[1:], ("01-spring", "02-summer"), strict=True):
        scores = entry["scores"]
        found = (scores["compass"]["score"], scores["heading"]["score"])
        assert found == pytest.approx(_oracle(runs[stage], task, harness))
        assert (scores["compass"]["metric"], scores["compass"]["samples"]) == ("acc", DOCUMENTS)
        assert (scores["heading"]["metric"], scores["heading"]["samples"]) == ("exact_match", DOCUMENTS)
    moved = {tuple(values["score"] for values in entry["scores"].values()) for entry in general}
    assert len(moved) > 1, "nothing moves: this shows nothing"


def test_metrics_weigh_learning_against_forgetting(runs: dict[str, Path]) -> None:
    metrics = _metrics(runs["zero2"])
    first, *_, last = [[values["score"] for values in entry["scores"].values()] for entry in metrics["general"]]
    assert metrics["general_ability"] == pytest.approx(sum(last) / 2)
    assert metrics["general_forgetting"] == pytest.approx((sum(first) - sum(last)) / 2)


def test_measuring_leaves_the_run_alone(runs: dict[str, Path]) -> None:
    """Sharded weights, hooks, random numbers: training continues as if nothing had been measured in between."""
    with_it, without = _metrics(runs["zero3"]), _metrics(runs["without"])
    assert with_it["accuracy_matrix"] == without["accuracy_matrix"]
    assert without["general"] == []
    assert without["general_ability"] is None
    saved = "tasks/02-summer/model/model.safetensors"
    assert (runs["zero3"] / saved).read_bytes() == (runs["without"] / saved).read_bytes()


def test_what_is_measured_is_not_measured_again(zygote: Zygote, runs: dict[str, Path], tmp_path: Path) -> None:
    """Killed before the second of the two tasks, after the first training: the fourth measurement of the run."""
    recipe = (runs["zero2"].parent / "recipe.yaml").read_text().replace(str(runs["zero2"]), str(tmp_path / "run"))
    (tmp_path / "recipe.yaml").write_text(recipe)
    argv = ["run", str(tmp_path / "recipe.yaml"), "--debug"]
    fault = {"moment": "general ability", "on_rank": 1, "count": 4}
    outcome = zygote.run(argv, tmp_path, world=2, timeout=400.0, fault=fault)
    assert outcome.codes[1] == -signal.SIGKILL, "the moment never came"
    assert _measured(tmp_path / "run") == _measured(runs["zero2"])[:3]
    outcome = zygote.run([*argv, "--resume"], tmp_path, world=2, timeout=400.0)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    assert _measured(tmp_path / "run") == _measured(runs["zero2"])
    assert _metrics(tmp_path / "run")["general"] == _metrics(runs["zero2"])["general"]


def test_a_task_without_steps_is_measured_with_what_was_learnt(zygote: Zygote, tmp_path: Path) -> None:
    """Killed while the second task of multi_task is measured: the resume has trained nothing itself."""
    tasks = write_harness_tasks(tmp_path / "harness", DOCUMENTS)
    general = {"tasks": ["compass", "heading"], "include_path": str(tasks), "after": "all", "batch_size": 3}
    changes = {"method": {"name": "multi_task"}, "train": {"epochs": 6, "learning_rate": 3e-3}}
    measured = {}
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        argv = ["run", str(write_recipe(tmp_path / name, eval={"general": general}, **changes)), "--debug"]
        fault = {"moment": "general ability", "on_rank": 0, "count": 5} if name == "killed" else None
        outcome = zygote.run(argv, tmp_path / name, world=2, timeout=400.0, fault=fault)
        if fault is not None:
            assert outcome.codes[0] == -signal.SIGKILL, "the moment never came"
            outcome = zygote.run([*argv, "--resume"], tmp_path / name, world=2, timeout=400.0)
        assert outcome.codes == [0, 0], "\n".join(outcome.output)
        measured[name] = _metrics(tmp_path / name / "run")["general"]
    assert measured["killed"] == measured["undisturbed"]
    untouched, *learnt = [entry["scores"] for entry in measured["undisturbed"]]
    assert learnt[0] == learnt[1] != untouched, "nothing moves: this shows nothing"


def _measured(run: Path) -> list[tuple[str, str]]:
    """Place and task of every measurement in the log."""
    records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [(record["after"], record["task"]) for record in records if record["event"] == "general"]
