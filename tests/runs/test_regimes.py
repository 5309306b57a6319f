"""Pre-training, end tasks with a fresh head, instruction tuning in a chat template: whole runs on two ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cl_dist.config.load import load_recipe
from tests.recipes import write_recipe
from tests.tasks.data import write_json, write_lines
from tests.zygote import Zygote

DOMAINS = ("restaurant", "acl", "ai", "phone", "pubmed", "camera")
SUMMARY, VERDICT = "red sun", "blue moon glow"
"""The answer to every sample of the generation tasks, so that a tiny model can learn it."""
SUMMARIES = (SUMMARY, "sun")
"""All right answers of the one task."""


def _run(zygote: Zygote, folder: Path, *arguments: str) -> Path:
    folder.mkdir(exist_ok=True)
    outcome = zygote.run(["run", *arguments, "--debug"], folder, world=2)
    assert outcome.codes == [0, 0], "\n".join(outcome.output)
    (folder / "screen.txt").write_text(outcome.output[0])
    return folder / "run"


def _settings(**values: Any) -> list[str]:
    return [part for key, value in values.items() for part in ("--set", f"{key.replace('__', '.')}={value}")]


def _matrix(run: Path) -> list[list[float]]:
    matrix: list[list[float]] = json.loads((run / "metrics.json").read_text())["accuracy_matrix"]
    return matrix


@pytest.fixture(scope="module")
def instructed(zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder on a domain corpus, then on tasks in the formats of Super-NaturalInstructions and TRACE, all in one
    stream, the tasks in the chat template.
    """
    root = tmp_path_factory.mktemp("instructed")
    write_lines(root / "weather.txt", ["the rain falls on the old town"] * 40)
    instances = [{"id": str(n), "input": f"text {n}", "output": list(SUMMARIES)} for n in range(32)]
    records = [{"prompt": f"question {n}?", "answer": VERDICT} for n in range(32)]
    for split in ("train", "test", "eval"):
        taken = 32 if split == "train" else 5
        superni = {"Definition": "Shorten.", "Instances": instances[:taken]}
        write_json(root / "SuperNI" / "task1572_samsum_summary" / f"{split}.json", superni)
        write_json(root / "TRACE" / "C-STANCE" / f"{split}.json", records[:taken])
    tasks = [
        {"name": "weather", "format": "text", "path": str(root / "weather.txt")},
        {"name": "1572", "format": "superni", "path": str(root / "SuperNI")},
        {"name": "C-STANCE", "format": "trace", "path": str(root / "TRACE")},
    ]
    train = {"max_length": 160, "template": "chat", "epochs": 8, "learning_rate": 3e-3, "max_target_length": 20}
    path = write_recipe(
        root, stream={"tasks": tasks}, train=train, method={"name": "sequential"}, eval={"max_new_tokens": 20}
    )
    return _run(zygote, root, str(path))


def test_generation_tasks_are_learnt_in_the_chat_template(instructed: Path) -> None:
    matrix = _matrix(instructed)
    assert max(matrix[0][1:]) < 0.2
    assert matrix[2][1] > 0.9
    assert matrix[3][2] > 0.9
    assert matrix[1][0] > matrix[0][0] + 1, "mean log-likelihood of the corpus"


@pytest.mark.parametrize(("task", "answers"), [("1572", SUMMARIES), ("C-STANCE", (VERDICT,))])
def test_generated_answers_are_scored_by_rouge_l(instructed: Path, task: str, answers: tuple[str, ...]) -> None:
    log = [json.loads(line) for line in (instructed / "log.jsonl").read_text().splitlines()]
    events = [each for each in log if each["event"] == "evaluation" and each["task"] == task]
    assert {(each["mode"], each["metric"], each["samples"]) for each in events} == {("generate", "rouge_l", 5)}
    for event in events:
        file = instructed / "tasks" / event["folder"] / "predictions" / f"{task}.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        scores = [max(_rouge_l(line["prediction"], answer) for answer in answers) for line in lines]
        assert [_rouge_l(line["prediction"], line["reference"]) for line in lines] == scores
        assert {line["reference"] for line in lines} <= set(answers)
        assert event["score"] == pytest.approx(sum(scores) / 5)


def test_how_each_task_was_scored_is_told(instructed: Path) -> None:
    metrics = json.loads((instructed / "metrics.json").read_text())
    assert metrics["metric"] == {"weather": "log_likelihood", "1572": "rouge_l", "C-STANCE": "rouge_l"}
    assert metrics["scored_on"] == {"weather": "train", "1572": "test", "C-STANCE": "test"}
    log = [json.loads(line) for line in (instructed / "log.jsonl").read_text().splitlines()]
    last = {each["task"]: each for each in log if each["event"] == "evaluation"}
    for name in ("1572", "C-STANCE"):
        file = instructed / "tasks" / last[name]["folder"] / "predictions" / f"{name}.jsonl"
        cut = sum(json.loads(line)["cut"] for line in file.read_text().splitlines())
        assert metrics["cut_generations"][name] == last[name]["cut_generations"] == cut
        first = next(each for each in log if each["event"] == "evaluation" and each["task"] == name)
        assert first["cut_generations"] == 5, "the untouched model does not know where to stop"
    assert "weather" not in metrics["cut_generations"]
    folders = sorted({each["folder"] for each in log if each["event"] == "evaluation"})  # 00-untouched first
    for row, place in zip(metrics["cut_generations_matrix"], folders, strict=True):
        events = {each["task"]: each for each in log if each["event"] == "evaluation" and each["folder"] == place}
        assert row == [events.get(task, {}).get("cut_generations") for task in metrics["tasks"]]
    notices = {(each["task"], each["about"]): each["message"] for each in log if each["event"] == "notice"}
    # Each is scored on samples that it is trained on.
    scored_on = {(name, "scored_on") for name in ("weather", "1572", "C-STANCE")}
    assert set(notices) == {*scored_on, (None, "metrics")}
    assert metrics["notes"][0].startswith("the metrics are means of different scores")
    screen = (instructed.parent / "screen.txt").read_text()
    assert all(text in screen for text in notices.values())
    assert "the metrics are means of different scores: log_likelihood (weather); rouge_l (1572, C-STANCE)" in screen
    assert "scored on training data: weather" in screen
    assert "generated answers cut at eval.max_new_tokens (20): 1572 5 of 5, C-STANCE 5 of 5" in screen


def _rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; the references' words are their own stems."""
    found, wanted = (re.findall("[a-z0-9]+", text.lower()) for text in (prediction, reference))
    row = [0] * (len(wanted) + 1)
    for word in found:
        previous = row[:]
        for i, other in enumerate(wanted):
            row[i + 1] = previous[i] + 1 if word == other else max(row[i], previous[i + 1])
    return 2 * row[-1] / (len(found) + len(wanted)) if row[-1] else 0.0


def test_domains_and_then_end_tasks_with_a_fresh_head(zygote: Zygote, tmp_path: Path) -> None:
    for number, domain in enumerate(DOMAINS):
        words = f"all about {domain} and what it is for"
        write_lines(tmp_path / "domains" / domain / "train.txt", [f"{words} {n % (number + 2)}" for n in range(24)])
        write_lines(tmp_path / "domains" / domain / "test.txt", [words])
    settings = _settings(
        stream__root=tmp_path / "domains",
        model__name_or_path="builtin:roberta-tiny",
        train__micro_batch_size=2,
        train__gradient_accumulation=1,
        train__max_length=64,
        train__max_steps_per_task=8,
        train__warmup_steps=0,
        train__learning_rate="3e-3",
        output_dir=tmp_path / "first" / "run",
    )
    first = _run(zygote, tmp_path / "first", "pretrain-domains", *settings)
    matrix = _matrix(first)
    assert len(matrix) == 7
    assert matrix[6][5] > matrix[0][5], "log-likelihood of the last domain's masked tokens"

    saved = first / "tasks" / "06-camera" / "model"
    (tmp_path / "second").mkdir()
    # The rate is too small to change a weight, so the second run saves what it started from.
    path = write_recipe(
        tmp_path / "second", model={"name_or_path": str(saved)}, train={"learning_rate": 1e-30, "max_steps_per_task": 2}
    )
    second = _run(zygote, tmp_path / "second", str(path))
    pretrained = load_file(saved / "model.safetensors")
    tuned = load_file(second / "tasks" / "02-summer" / "model" / "model.safetensors")
    body = [name for name in pretrained if name.startswith("roberta.")]
    assert len(body) > 30
    for name in body:
        torch.testing.assert_close(tuned[name], pretrained[name], rtol=0, atol=0, msg=name)
    assert {name.partition(".")[0] for name in tuned if name not in pretrained} == {"classifier"}
    assert tuned["classifier.out_proj.weight"].shape[0] == 4
    assert tuned["classifier.out_proj.weight"].std() > 0


@pytest.mark.parametrize(
    ("name", "model"), [("pretrain-domains", "builtin:roberta-tiny"), ("instruct-code", "builtin:llama-tiny")]
)
def test_shipped_recipes_take_data_and_model(tmp_path: Path, name: str, model: str) -> None:
    recipe, _ = load_recipe(name, [f"stream.root={tmp_path}", f"model.name_or_path={model}"])
    assert recipe.stream.root == str(tmp_path)
    assert all(task.path is not None and not Path(task.path).is_absolute() for task in recipe.stream.tasks)
