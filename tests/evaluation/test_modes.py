"""Which mode scores which task, and which settings are refused."""

from __future__ import annotations

from typing import Any

import pytest

from cl_dist.config.schema import EvalConfig
from cl_dist.errors import BadInput
from cl_dist.evaluation.modes import resolve_mode
from cl_dist.tasks.types import Task
from tests.evaluation import rank_jobs

CLASSIFY, CONTINUE, READ = rank_jobs.classification(7), rank_jobs.generation(7), rank_jobs.text(20)


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
            "'read' cannot be scored this way with a seq2seq_lm model, which allows likelihood or gen",
        ),
        (CLASSIFY, "classification", "generate", "'classify' cannot be scored this way with a classification model"),
        (CLASSIFY, "classification", "perplexity", "'classify' cannot be scored this way with a classification model"),
        (CONTINUE, "classification", "auto", "'continue' cannot be scored this way with a classification model"),
        (
            CLASSIFY,
            "masked_lm",
            "auto",
            "'classify' cannot be scored this way with a masked_lm model, which allows perplexity",
        ),
        (CLASSIFY, "causal_lm", "perplexity", "'classify' is a classification task, and perplexity is for text"),
    ],
)
def test_impossible_modes(task: Task, objective: Any, mode: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message) as error:
        resolve_mode(task, objective, EvalConfig(mode=mode))
    assert "eval.mode" in str(error.value)
    assert "\n" not in str(error.value)


def test_joint_goal_accuracy_needs_turns() -> None:
    assert resolve_mode(rank_jobs.dialogue(["a"]), "seq2seq_lm", EvalConfig(metric="jga")) == "generate"
    for task in (CLASSIFY, CONTINUE):
        with pytest.raises(BadInput, match=rf"eval\.metric jga: task '{task.name}' has no dialogue turns"):
            resolve_mode(task, "causal_lm", EvalConfig(metric="jga"))


def test_macro_f1_needs_labels() -> None:
    assert resolve_mode(CLASSIFY, "causal_lm", EvalConfig(metric="macro_f1")) == "likelihood"
    with pytest.raises(BadInput, match=r"eval\.metric macro_f1: task 'continue' has no labels to take the F1 of"):
        resolve_mode(CONTINUE, "causal_lm", EvalConfig(metric="macro_f1"))
