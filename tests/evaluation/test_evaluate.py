"""Passes over whole tasks: training modes, pauses, the grouping of tasks, and two ranks compared with one process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from cl_dist.evaluation.evaluate import PAUSE_BATCHES
from tests.evaluation import rank_jobs
from tests.evaluation.rank_jobs import built, score_one
from tests.evaluation.tiny import scaled
from tests.ranks import run_ranks

LLAMA, T5, ROBERTA = "builtin:llama-tiny", "builtin:t5-tiny", "builtin:roberta-tiny"
CLASSIFY, CONTINUE, READ = rank_jobs.classification(7), rank_jobs.generation(7), rank_jobs.text(20)


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


KINDS = [["classification", 7], ["classification", 1], ["generation", 7]]
CASES: list[dict[str, Any]] = [
    {"model": LLAMA, "tasks": [*KINDS, ["text", 20]], "stage": 2},
    {"model": LLAMA, "tasks": [*KINDS, ["text", 20]], "stage": 3, "gather": True},
    {"model": LLAMA, "tasks": KINDS, "stage": 3, "lora": True, "gather": True},
    # Three batches, from two tasks, on each rank; with one pass per task a rank would be idle three times.
    {"model": LLAMA, "tasks": KINDS, "stage": 2},
    # One rank has nine batches and pauses before the last one, the other has eight.
    {"model": LLAMA, "tasks": [["classification", 17]], "stage": 2, "batch_size": 1},
    {"model": T5, "tasks": KINDS, "stage": 3, "gather": True},
    {"model": T5, "tasks": KINDS, "stage": 3, "lora": True, "batch_size": 1},
    {"model": LLAMA, "tasks": [["dialogue", ["?"] * 9]], "stage": 2, "metric": "jga"},
    {"model": ROBERTA, "tasks": KINDS[:2], "stage": 3},
    {"model": ROBERTA, "tasks": [["text", 20]], "stage": 3, "objective": "masked_lm"},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of the built-in models with larger weights, so that they answer differently to different prompts."""
    made = {}
    for name, objective in ((LLAMA, "auto"), (T5, "auto"), (ROBERTA, "auto"), (ROBERTA, "masked_lm")):
        loaded = rank_jobs.load({"model": name, "objective": objective}, None, len(rank_jobs.LABELS))
        folder = str(tmp_path_factory.mktemp("model"))
        model = scaled(loaded.model)
        if name == LLAMA:
            with torch.no_grad():  # make the end likely: one rank finishes before the other
                model.get_output_embeddings().weight[loaded.tokenizer.eos_token_id] *= 3
        model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        made[name + objective] = folder
    return made


def on_disk(case: dict[str, Any], folders: dict[str, str]) -> dict[str, Any]:
    """The case with its model's folder; the slots' references are what the model generates, except for one."""
    whole = {**case, "model": folders[case["model"] + case.get("objective", "auto")]}
    if case.get("metric") != "jga":
        return whole
    (score,) = rank_jobs.evaluate_alone(whole)
    said = [prediction["prediction"].lower() for prediction in score["predictions"]]
    return {**whole, "tasks": [["dialogue", [*said[:4], "something else", *said[5:]]]]}


@pytest.fixture(scope="module")
def two_ranks(folders: dict[str, str]) -> list[list[dict[str, Any]]]:
    """Each rank's results for each case."""
    cases = [on_disk(case, folders) for case in CASES]
    return run_ranks("tests.evaluation.rank_jobs:evaluate_on_ranks", world=2, arguments={"cases": cases}, timeout=300)


def close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Equal; scores up to rounding, because a gathered weight may be aligned differently in memory."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        wanted = pytest.approx(value, rel=1e-5) if isinstance(value, float | dict) else value
        assert found[name] == wanted, name


def assert_varied(scores: list[dict[str, Any]]) -> None:
    """A model that always answers the same would hide mixed-up samples."""
    for score in scores:
        answers = {(prediction["prediction"], prediction["score"]) for prediction in score["predictions"]}
        assert len(answers) > 1 or score["count"] == 1


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


@pytest.mark.parametrize("number", [number for number, case in enumerate(CASES) if case.get("gather")])
def test_gathered_weights_generate_the_same_and_leave_no_trace(
    two_ranks: list[list[dict[str, Any]]], number: int
) -> None:
    """The scores after it, which come from an engine that has trained since, are compared above."""
    ranks = [rank[number] for rank in two_ranks]
    for rank in ranks:
        assert rank["gathered"]["scores"] == rank["before"]
        assert rank["gathered"]["restored"]
    # Sharded ranks run as many passes as the one with most to do. Now each stops after its own answers.
    sharded, whole = zip(*(rank["gathered"]["passes"] for rank in ranks), strict=True)
    assert sharded[0] == sharded[1]
    assert 0 < min(whole) < max(whole) <= sharded[0]
