"""The real benchmark files, where they are present."""

from __future__ import annotations

from pathlib import Path

import pytest

from cl_dist.config.schema import StreamConfig, TaskConfig
from cl_dist.tasks.orders import ORDERS, read_order
from cl_dist.tasks.stream import load_stream
from tests.tasks.data import REAL_DATA, load_one, needs_real_data

pytestmark = needs_real_data


def test_all_fifteen_tasks_of_the_long_benchmark() -> None:
    tasks = tuple(TaskConfig(name=name, format="tasl") for name in ORDERS["4"])
    loaded = load_stream(StreamConfig(tasks=tasks, root=str(REAL_DATA / "long_sequence")), Path())
    assert {task.name: len(task.labels) for task in loaded} == {
        "mnli": 3, "cb": 3, "wic": 2, "copa": 2, "qqp": 2, "boolqa": 2, "rte": 2, "imdb": 2, "yelp": 5, "amazon": 5,
        "sst-2": 2, "dbpedia": 14, "agnews": 4, "multirc": 2, "yahoo": 10,
    }  # fmt: skip
    assert {task.kind for task in loaded} == {"classification"}
    assert {(task.labels_from, task.unlisted) for task in loaded} == {("training answers", 0)}
    assert {task.name: task.scored_on for task in loaded if task.scored_on != "test"} == {
        "dbpedia": "dev", "yahoo": "dev",
    }  # fmt: skip
    assert {task.name: len(task.evaluation) for task in loaded if task.name in ("dbpedia", "yahoo", "agnews")} == {
        "dbpedia": 500, "yahoo": 500, "agnews": 2000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        (
            "agnews",
            "What is the topic of the following paragraph? Choose one from the option.\n"
            "Option: World, Sports, Business, Science or Technology \nTitle: Intel Seen",
            "on wireless networks.\n\nAnswer:",
        ),
        (
            "RTE",
            'What is the logical relationship between the "sentence 1" and the "sentence 2"? Choose one from the '
            "option.\nOption: contradiction, entailment \nsentence 1: What is certain",
            "10,000 years ago.\nAnswer:",
        ),
        (
            "wic",
            "Given a word and two sentences, whether the word is used with the same sense in both sentence? Choose one "
            "from the option.\nOption: True, False \nword: call",
            "on a customer.\nAnswer:",
        ),
        ("COPA", "Which sentence is the cause of", "catch the flu.\nAnswer:"),
    ],
)
@pytest.mark.parametrize("instruction_file", [None, "CL_Benchmark_configs/instruction_config.json"])
def test_cl_benchmark_prompts(name: str, start: str, end: str, instruction_file: str | None) -> None:
    stream = {"root": str(REAL_DATA), "instruction_file": instruction_file}
    prompt = load_one(Path(), name, stream, format="cl_benchmark", path="CL_Benchmark").train[0].prompt
    assert prompt.startswith(start)
    assert prompt.endswith(end)


@pytest.mark.parametrize("order", ["1", "2", "3"])
def test_order_folders_agree_with_the_published_orders(order: str) -> None:
    assert read_order(REAL_DATA / "CL_Benchmark_configs" / f"order{order}") == list(ORDERS[order])
