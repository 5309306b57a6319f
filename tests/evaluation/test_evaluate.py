"""Scoring of whole tasks: modes, metrics, order, modes of the modules; and two ranks against one process."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cl_dist.config.schema import EvalConfig
from cl_dist.errors import BadInput
from cl_dist.evaluation.choice import resolve_mode
from cl_dist.evaluation.evaluate import PAUSE_BATCHES, Evaluator
from cl_dist.evaluation.result import Prediction, TaskScore, weighted_mean, write_predictions
from cl_dist.evaluation.scores import macro_f1
from cl_dist.models.load import LoadedModel
from cl_dist.tasks.types import Task
from tests.evaluation import rank_jobs
from tests.evaluation.tiny import scaled
from tests.ranks import run_ranks

LLAMA, T5, ROBERTA = "builtin:llama-tiny", "builtin:t5-tiny", "builtin:roberta-tiny"
CLASSIFY, CONTINUE, READ = rank_jobs.classification(7), rank_jobs.generation(7), rank_jobs.text(20)


def built(model: str, tasks: list[Any], **case: Any) -> tuple[Evaluator, LoadedModel]:
    """An evaluator in this process, and its model."""
    whole = {"model": model, "tasks": tasks, **case}
    loaded = rank_jobs.load(whole, None, len(rank_jobs.LABELS))
    return rank_jobs.evaluator(loaded, loaded.model, whole), loaded


def score_one(evaluator: Evaluator, task: Task) -> TaskScore:
    """The score of a pass over one task."""
    return evaluator.evaluate([task])[0]


def test_likelihood_chooses_the_label_of_least_loss() -> None:
    evaluator, loaded = built(LLAMA, [["classification", 7]])
    score = score_one(evaluator, CLASSIFY)
    model, tokenizer = loaded.model, loaded.tokenizer
    for index, (prediction, example) in enumerate(zip(score.predictions, CLASSIFY.evaluation, strict=True)):
        losses = []
        for label in CLASSIFY.labels:
            prompt = tokenizer(example.prompt)["input_ids"]
            answer = [*tokenizer(f" {label}", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            labels = torch.tensor([[-100] * len(prompt) + answer])
            with torch.no_grad():
                mean = model(input_ids=torch.tensor([prompt + answer]), labels=labels).loss
            losses.append(float(mean) * len(answer))
        best = CLASSIFY.labels[losses.index(min(losses))]
        assert prediction == Prediction(index, best, example.answer, float(best == example.answer))
    assert (score.mode, score.metric, score.count) == ("likelihood", "exact_match", 7)
    assert score.score == sum(prediction.score for prediction in score.predictions) / 7


def test_equally_likely_labels_give_the_first() -> None:
    evaluator, loaded = built(LLAMA, [["classification", 3]])
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.zero_()
    task = replace(CLASSIFY, labels=("no", "ye", "ok"))
    assert {prediction.prediction for prediction in score_one(evaluator, task).predictions} == {"no"}


def test_classification_head_is_restricted_to_the_tasks_labels() -> None:
    evaluator, loaded = built(ROBERTA, [["classification", 7]])
    with torch.no_grad():
        loaded.model.get_parameter("classifier.out_proj.bias").copy_(torch.tensor([50.0, 1.0, 25.0]))
    all_labels = score_one(evaluator, CLASSIFY)
    some = score_one(evaluator, replace(CLASSIFY, labels=(rank_jobs.LABELS[1], rank_jobs.LABELS[2])))
    assert {prediction.prediction for prediction in all_labels.predictions} == {rank_jobs.LABELS[0]}
    assert {prediction.prediction for prediction in some.predictions} == {rank_jobs.LABELS[2]}


def test_generation_scores() -> None:
    evaluator, _ = built(LLAMA, [["generation", 7]])
    score = score_one(evaluator, CONTINUE)
    assert (score.mode, score.metric) == ("generate", "rouge_l")
    evaluator, _ = built(LLAMA, [["classification", 7]], mode="generate")
    score = score_one(evaluator, CLASSIFY)
    assert (score.mode, score.metric) == ("generate", "exact_match")
    assert all(prediction.prediction == prediction.prediction.strip() for prediction in score.predictions)


def test_the_closest_of_several_references_counts() -> None:
    evaluator, _ = built(LLAMA, [["generation", 2]])
    plain = CONTINUE.evaluation[:2]
    said = [each.prediction for each in score_one(evaluator, replace(CONTINUE, evaluation=plain)).predictions]
    references = [("none of it", f"{said[0]} zebra", said[0]), ("none of it", "nor this")]
    several = tuple(
        replace(each, answer="none of it", references=right) for each, right in zip(plain, references, strict=True)
    )
    first, second = score_one(evaluator, replace(CONTINUE, evaluation=several)).predictions
    assert (first.reference, first.score) == (said[0], 1.0)
    assert (second.reference, second.score) == ("none of it", 0.0)


@pytest.mark.parametrize("mode", ["likelihood", "generate"])
def test_macro_f1_is_the_score_or_stands_beside_it(mode: str) -> None:
    """The same predictions either way."""
    scores = {}
    for metric in ("exact_match", "macro_f1"):
        evaluator, _ = built(LLAMA, [["classification", 7]], mode=mode, metric=metric)
        scores[metric] = score_one(evaluator, CLASSIFY)
        assert scores[metric].metric == metric
    accuracy, f1 = scores["exact_match"], scores["macro_f1"]
    assert f1.predictions == accuracy.predictions
    pairs = [(each.prediction, each.reference) for each in f1.predictions]
    assert f1.score == accuracy.extras["macro_f1"] == macro_f1(pairs, CLASSIFY.labels)
    assert accuracy.score == f1.extras["exact_match"] == weighted_mean(f1.predictions)


def test_causal_perplexity_is_that_of_the_models_own_loss() -> None:
    evaluator, loaded = built(LLAMA, [["text", 20]])
    score = score_one(evaluator, READ)
    encoder = evaluator._subject.encoder
    total, tokens = 0.0, 0
    for chunk in encoder.text_chunks(READ.evaluation):
        ids, labels = torch.tensor([chunk.input_ids]), torch.tensor([chunk.labels])
        with torch.no_grad():
            total += float(loaded.model(input_ids=ids, labels=labels).loss) * chunk.targets
        tokens += chunk.targets
    assert len(score.predictions) == score.count > 1
    assert score.metric == "log_likelihood"
    assert score.score == pytest.approx(-total / tokens, rel=1e-5)
    assert score.extras["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_masked_perplexity_is_the_same_every_time_and_of_the_right_size() -> None:
    evaluator, loaded = built(ROBERTA, [["text", 20]], objective="masked_lm")
    first, second = score_one(evaluator, READ), score_one(evaluator, READ)
    assert first == second
    with torch.no_grad():
        for parameter in loaded.model.parameters():
            parameter.zero_()
    uniform = score_one(evaluator, READ)
    assert uniform.extras["perplexity"] == pytest.approx(loaded.model.config.vocab_size, rel=1e-4)
    weights = [prediction.weight for prediction in uniform.predictions]
    chunks = evaluator._subject.encoder.text_chunks(READ.evaluation)
    assert 0.05 < sum(weights) / sum(chunk.targets for chunk in chunks) < 0.3


def test_training_modes_are_restored_and_dropout_is_off() -> None:
    evaluator, loaded = built(LLAMA, [["classification", 7]], lora=True)
    model: nn.Module = loaded.model
    model.train()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    frozen = linears[0].eval()
    seen: list[bool] = []
    for linear in linears:
        linear.register_forward_hook(lambda module, *_: seen.append(module.training or torch.is_grad_enabled()))
    score_one(evaluator, CLASSIFY)
    assert seen
    assert not any(seen)
    assert [module for module in model.modules() if not module.training] == [frozen]
    assert torch.is_grad_enabled()


def test_training_modes_are_restored_after_an_error() -> None:
    evaluator, loaded = built(LLAMA, [["classification", 7]])
    loaded.model.train()
    loaded.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score_one(evaluator, CLASSIFY)
    assert all(module.training for module in loaded.model.modules())


def test_a_pause_ends_the_evaluation_between_two_batches() -> None:
    evaluator, loaded = built(LLAMA, [["classification", 20]], batch_size=1)
    forwards: list[int] = []
    loaded.model.register_forward_hook(lambda *_: forwards.append(1))
    at_pauses: list[int] = []

    def pause() -> None:
        at_pauses.append(len(forwards))
        if len(at_pauses) == 2:
            raise InterruptedError

    loaded.model.train()
    with pytest.raises(InterruptedError):
        evaluator.evaluate([rank_jobs.classification(20)], pause)
    assert at_pauses[1] - at_pauses[0] == PAUSE_BATCHES
    assert len(forwards) == at_pauses[1]
    assert loaded.model.training


def test_tasks_in_one_pass_score_as_alone() -> None:
    evaluator, _ = built(LLAMA, [["classification", 7], ["generation", 7], ["text", 20]])
    other = replace(rank_jobs.classification(4, "other"), labels=("may", "not", "yes"))
    tasks = [CLASSIFY, CONTINUE, READ, other]
    together = evaluator.evaluate(tasks)
    assert together == [score_one(evaluator, task) for task in tasks]
    assert [score.task for score in together] == ["classify", "continue", "read", "other"]


@pytest.mark.parametrize(
    ("world", "synced", "expected"),
    [(1, False, [1, 1, 1, 1, 1]), (2, False, [1, 2, 2]), (3, False, [3, 2]), (2, True, [1, 1, 1, 1, 1])],
)
def test_passes(world: int, synced: bool, expected: list[int]) -> None:
    case = {"model": LLAMA, "tasks": [["classification", 7]]}
    loaded = rank_jobs.load(case, None, len(rank_jobs.LABELS))
    evaluator = rank_jobs.evaluator(loaded, loaded.model, case, 0, world, synced)
    tasks = [rank_jobs.classification(size, str(size)) for size in (24, 9, 15, 3, 1)]
    passes = evaluator.passes(tasks)
    assert [task for each in passes for task in each] == tasks
    assert [len(each) for each in passes] == expected


@pytest.mark.parametrize(
    ("task", "objective", "mode", "expected"),
    [
        (CLASSIFY, "causal_lm", "auto", "likelihood"),
        (CLASSIFY, "seq2seq_lm", "auto", "likelihood"),
        (CLASSIFY, "classification", "auto", "likelihood"),
        (CLASSIFY, "causal_lm", "generate", "generate"),
        (CONTINUE, "seq2seq_lm", "auto", "generate"),
        (READ, "causal_lm", "auto", "perplexity"),
        (READ, "masked_lm", "perplexity", "perplexity"),
    ],
)
def test_modes(task: Task, objective: Any, mode: Any, expected: str) -> None:
    assert resolve_mode(task, objective, EvalConfig(mode=mode)) == expected


@pytest.mark.parametrize(
    ("task", "objective", "mode", "message"),
    [
        (CONTINUE, "causal_lm", "likelihood", "'continue' has no labels to choose from"),
        (READ, "causal_lm", "likelihood", "'read' has no labels to choose from"),
        (READ, "causal_lm", "generate", "'read' is plain text without prompts"),
        (
            READ,
            "seq2seq_lm",
            "auto",
            "'read' cannot be scored so with a seq2seq_lm model, which allows likelihood or gen",
        ),
        (CLASSIFY, "classification", "generate", "'classify' cannot be scored so with a classification model"),
        (CLASSIFY, "classification", "perplexity", "'classify' cannot be scored so with a classification model"),
        (CONTINUE, "classification", "auto", "'continue' cannot be scored so with a classification model"),
        (
            CLASSIFY,
            "masked_lm",
            "auto",
            "'classify' cannot be scored so with a masked_lm model, which allows perplexity",
        ),
        (CLASSIFY, "causal_lm", "perplexity", "'classify' is a classification task, and perplexity is for text"),
    ],
)
def test_impossible_modes(task: Task, objective: Any, mode: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        resolve_mode(task, objective, EvalConfig(mode=mode))
    assert "eval.mode" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_turn_is_right_when_all_of_its_slots_are() -> None:
    task = rank_jobs.dialogue(["?"] * 9)
    evaluator, _ = built(LLAMA, [["generation", 7]])
    said = [each.prediction.lower() for each in score_one(evaluator, task).predictions]
    score = score_one(evaluator, rank_jobs.dialogue([*said[:4], "something else", *said[5:]]))
    assert (score.mode, score.metric, score.count) == ("generate", "jga", 9)
    assert score.score == pytest.approx(2 / 3)
    assert score.extras["slot_accuracy"] == pytest.approx(8 / 9)
    assert [prediction.score for prediction in score.predictions] == [1.0] * 4 + [0.0] + [1.0] * 4


def test_joint_goal_accuracy_needs_turns() -> None:
    assert resolve_mode(rank_jobs.dialogue(["a"]), "seq2seq_lm", EvalConfig(metric="jga")) == "generate"
    for task in (CLASSIFY, CONTINUE):
        with pytest.raises(BadInput, match=rf"eval\.metric jga: task '{task.name}' has no turns"):
            resolve_mode(task, "causal_lm", EvalConfig(metric="jga"))


def test_macro_f1_needs_labels() -> None:
    assert resolve_mode(CLASSIFY, "causal_lm", EvalConfig(metric="macro_f1")) == "likelihood"
    with pytest.raises(BadInput, match=r"eval\.metric macro_f1: task 'continue' has no labels, whose F1 it is"):
        resolve_mode(CONTINUE, "causal_lm", EvalConfig(metric="macro_f1"))


def test_weighted_mean() -> None:
    assert weighted_mean([Prediction(0, "", "", 1.0, 3), Prediction(1, "", "", 0.0, 1)]) == 0.75
    with pytest.raises(ValueError, match="nothing to take the mean of"):
        weighted_mean([])


def test_predictions_are_written_as_json_lines(tmp_path: Path) -> None:
    predictions = [Prediction(0, "zwei\nZeilen", "ü", 0.5), Prediction(1, "b", "c", 0.0, 4)]
    write_predictions(tmp_path / "new" / "predictions.jsonl", predictions)
    lines = (tmp_path / "new" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [Prediction(**json.loads(line)) for line in lines] == predictions


KINDS = [["classification", 7], ["classification", 1], ["generation", 7]]
CASES: list[dict[str, Any]] = [
    *[{"model": LLAMA, "tasks": [*KINDS, ["text", 20]], "stage": stage} for stage in (2, 3)],
    {"model": LLAMA, "tasks": KINDS, "stage": 3, "lora": True},
    # Three batches, of two tasks, on each rank: a pass each would leave one rank idle three times.
    {"model": LLAMA, "tasks": KINDS, "stage": 2},
    # One rank has nine batches and pauses before the last one, the other has eight.
    {"model": LLAMA, "tasks": [["classification", 17]], "stage": 2, "batch_size": 1},
    {"model": T5, "tasks": KINDS, "stage": 3},
    {"model": T5, "tasks": KINDS, "stage": 3, "lora": True, "batch_size": 1},
    {"model": LLAMA, "tasks": [["dialogue", ["?"] * 9]], "stage": 2, "metric": "jga"},
    {"model": ROBERTA, "tasks": KINDS[:2], "stage": 3},
    {"model": ROBERTA, "tasks": [["text", 20]], "stage": 3, "objective": "masked_lm"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The built-in models with wider weights, which answer differently to different prompts, saved to folders."""
    made = {}
    for name, objective in ((LLAMA, "auto"), (T5, "auto"), (ROBERTA, "auto"), (ROBERTA, "masked_lm")):
        loaded = rank_jobs.load({"model": name, "objective": objective}, None, len(rank_jobs.LABELS))
        folder = str(tmp_path_factory.mktemp("model"))
        model = scaled(loaded.model)
        if name == LLAMA:
            with torch.no_grad():  # likely ends: one rank is done while the other goes on
                model.get_output_embeddings().weight[loaded.tokenizer.eos_token_id] *= 3
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        made[name + objective] = folder
    return made


def on_disk(case: dict[str, Any], folders: dict[str, str]) -> dict[str, Any]:
    """The case with its model's folder; slots have the values that the model gives, but for one."""
    whole = {**case, "model": folders[case["model"] + case.get("objective", "auto")]}
    if case.get("metric") != "jga":
        return whole
    (score,) = rank_jobs.evaluate_alone(whole)
    said = [prediction["prediction"].lower() for prediction in score["predictions"]]
    return {**whole, "tasks": [["dialogue", [*said[:4], "something else", *said[5:]]]]}


@pytest.fixture(scope="module")
def two_ranks(folders: dict[str, str]) -> list[list[dict[str, Any]]]:
    """What each of two ranks found for each case."""
    cases = [on_disk(case, folders) for case in CASES]
    return run_ranks("tests.evaluation.rank_jobs:evaluate_on_ranks", world=2, arguments={"cases": cases}, timeout=300)


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal, scores up to rounding: a gathered weight may lie in memory otherwise aligned than a plain one."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float | dict) else value
        assert found[name] == wanted, name


def assert_varied(scores: list[dict[str, Any]]) -> None:
    """A model that always says the same would hide samples that were mixed up."""
    for score in scores:
        told = {(prediction["prediction"], prediction["score"]) for prediction in score["predictions"]}
        assert len(told) > 1 or score["count"] == 1


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c['model'][8:]}-{c['stage']}" for c in CASES])
def test_two_ranks_score_like_one_process(
    two_ranks: list[list[dict[str, Any]]], folders: dict[str, str], number: int
) -> None:
    first, second = (rank[number] for rank in two_ranks)
    alone = rank_jobs.evaluate_alone(on_disk(CASES[number], folders))
    assert_varied(alone)
    for moment in ("before", "after"):
        for task, expected in enumerate(alone):
            found = dict(first[moment][task])
            for prediction, wanted in zip(found.pop("predictions"), expected["predictions"], strict=True):
                close(prediction, wanted)
            close(found, {name: value for name, value in expected.items() if name != "predictions"})
            assert second[moment][task] == {**first[moment][task], "predictions": []}
