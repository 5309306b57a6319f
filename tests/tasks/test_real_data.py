"""The real benchmark files, where they are present."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from cl_dist.config.load import load_recipe
from cl_dist.config.schema import StreamConfig, TaskConfig, TrainConfig
from cl_dist.errors import BadInput
from cl_dist.evaluation.modes import resolve_mode
from cl_dist.models.builtin import byte_tokenizer
from cl_dist.tasks.encode import Encoder, label_names
from cl_dist.tasks.orders import ORDERS, read_order, resolve_order
from cl_dist.tasks.stream import load_stream
from cl_dist.tasks.types import Task
from tests.tasks.data import REAL_DATA, load_one, needs_real_data

pytestmark = needs_real_data


def test_all_fifteen_tasks_of_the_long_benchmark() -> None:
    tasks = tuple(TaskConfig(name=name, format="tasl") for name in ORDERS["4"])
    loaded = load_stream(StreamConfig(tasks=tasks, root=str(REAL_DATA / "long_sequence")), Path(), TrainConfig())
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


def published(folder: str) -> Path:
    """A benchmark's folder; the test is skipped where it is not at hand."""
    path = REAL_DATA / folder
    if not path.is_dir():
        pytest.skip(f"no {path}: the benchmark's public files go there, or below CL_DIST_TEST_DATA")
    return path


def load_shipped(recipe: str, folder: str, *changes: str) -> tuple[Task, ...]:
    """The tasks of a shipped recipe from the benchmark's own files, checked as a run checks them; the first samples
    are encoded too (the tokenizer is another, in which prompts are longer).
    """
    loaded, recipe_dir = load_recipe(recipe, [f"stream.root={published(folder)}", *changes])
    loaded = resolve_order(loaded, recipe_dir)
    tasks = load_stream(loaded.stream, recipe_dir, loaded.train)
    train = TrainConfig(max_length=64, max_target_length=loaded.train.max_target_length, long_answers="cut")
    encoder = Encoder(byte_tokenizer("encoder-decoder"), "seq2seq_lm", train, label_names(tasks))
    for task in tasks:
        resolve_mode(task, "seq2seq_lm", loaded.eval)
        assert len(encoder.train(replace(task, train=task.train[:60]))) == min(60, len(task.train))
    return tasks


LONG = {
    "dbpedia": (1000, 500), "amazon": (1000, 2500), "yahoo": (1000, 500), "agnews": (1000, 2000), "mnli": (1000, 1500),
    "cb": (250, 56), "wic": (1000, 638), "copa": (400, 100), "qqp": (1000, 1000), "boolqa": (1000, 1000),
    "rte": (1000, 277), "imdb": (1000, 1000), "yelp": (1000, 2500), "sst-2": (1000, 872), "multirc": (1000, 1000),
}  # fmt: skip
"""Training and evaluation samples in the sample of the long benchmark that TaSL uses (two tasks have no test file)."""


@pytest.mark.parametrize("order", "123456")
def test_the_shipped_recipes_of_orders_1_to_6(order: str) -> None:
    name = f"{'standard' if order in '123' else 'long'}-order{order}"
    tasks = load_shipped(name, "long_sequence")
    assert [task.name for task in tasks] == list(ORDERS[order])
    counts = {task.name: (len(task.train), len(task.evaluation)) for task in tasks}
    assert counts == {name: LONG[name] for name in ORDERS[order]}


@pytest.mark.parametrize("order", "123")
def test_the_shipped_recipes_on_cl_benchmark(order: str) -> None:
    changes = ["stream.format=cl_benchmark", "stream.name_tasks=true"]
    present = {path.parent.name for path in published("CL_Benchmark").glob("*/*/train.json")}
    if not set(ORDERS[order]) <= present:
        pytest.skip(f"CL_Benchmark here has no {', '.join(set(ORDERS[order]) - present)}")
    tasks = load_shipped(f"standard-order{order}", "CL_Benchmark", *changes)
    assert {task.train[0].prompt.splitlines()[0] for task in tasks} == {"Task:TC", "Task:SC"}


@pytest.mark.parametrize("order", "12")
def test_the_shipped_recipes_of_superni(order: str) -> None:
    tasks = load_shipped(f"superni-order{order}", "superni")
    counts = {task.name: (len(task.train), len(task.evaluation)) for task in tasks}
    assert counts["511"] == (1000, 100)
    assert sum(train for train, _ in counts.values()) == 11_741
    assert sum(evaluation for _, evaluation in counts.values()) == 1_197
    assert Counter(task.name for task in tasks for example in task.train if not example.answer) == {"511": 6}
    with pytest.raises(BadInput, match=r"task '511': .*task511_T5.json, record 50: field 'output' is empty"):
        load_shipped(f"superni-order{order}", "superni", "stream.empty_answers=error")


SERVICES = {
    "sgd_services_4": (2191, 682, 192), "sgd_services_3": (2837, 894, 271), "sgd_flights_3": (1676, 449, 108),
    "sgd_trains_1": (1761, 529, 109), "sgd_homes_2": (1562, 513, 125), "sgd_rentalcars_2": (2811, 807, 174),
    "sgd_music_1": (1045, 326, 123), "sgd_hotels_4": (1838, 451, 130), "sgd_media_2": (598, 189, 63),
    "sgd_hotels_3": (2486, 691, 177), "sgd_rentalcars_3": (1646, 464, 94), "sgd_hotels_1": (3224, 903, 231),
}  # fmt: skip
"""Training samples, evaluation samples and evaluation turns of services of TaSL's orders."""


@pytest.mark.parametrize("service", SERVICES)
def test_the_services_of_sgd(service: str) -> None:
    changes = ("stream.order=null", f"stream.tasks=[{{name: {service}, format: sgd, path: .}}]")
    (task,) = load_shipped("sgd-order1", "sgd", *changes)
    turns = {example.slot.turn for example in task.evaluation if example.slot is not None}
    assert (len(task.train), len(task.evaluation), len(turns)) == SERVICES[service]
