"""Every shipped recipe, with data in its format that the tests write and a tiny model in place of the large one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cl_dist.cli.run import check_stream_and_model
from cl_dist.config.load import load_recipe, shipped_recipes
from cl_dist.config.schema import Recipe, TaskConfig
from cl_dist.tasks.orders import resolve_order
from tests.tasks.data import as_lines, records, write_json, write_lines
from tests.zygote import Zygote

FAMILIES = {
    "t5-large": "builtin:t5-tiny",
    "t5-small": "builtin:t5-tiny",
    "roberta-base": "builtin:roberta-tiny",
    "meta-llama/Llama-2-7b-chat-hf": "builtin:llama-tiny",
    "meta-llama/Llama-2-7b-hf": "builtin:llama-tiny",
    "meta-llama/Meta-Llama-3-8B": "builtin:llama-tiny",
    "HuggingFaceTB/SmolLM2-135M-Instruct": "builtin:llama-tiny",
    "builtin:llama-tiny": "builtin:llama-tiny",
}
"""The built-in model of a recipe's model's family."""
SMALL = (
    "stream.max_train_samples=4",
    "stream.max_eval_samples=2",
    "train.max_steps_per_task=1",
    "train.warmup_steps=0",
    "train.micro_batch_size=2",
    "train.gradient_accumulation=1",
    "train.max_length=64",
    "train.max_target_length=16",
    "launch.processes=1",
    "eval.max_new_tokens=2",
    "eval.before_training=false",
    "eval.tasks=seen",
)
"""What makes a run of a few seconds of any recipe."""
EXTRA = {"instruct-code": ("train.template=none", "eval.general=null")}
"""What a tiny model cannot do: it has no chat template, and lm-evaluation-harness has tests of its own."""
REPRESENTATIVES = ("standard-order1", "superni-order1", "sgd-order1", "trace")
"""One recipe for every format and kind of scoring; the others differ in order and length."""
SGD = {f"sgd-order{number}" for number in range(1, 6)}
SPLITS = {"tasl": ("train", "dev", "test"), "trace": ("train", "eval", "test")}


def write_data(root: Path, recipe: Recipe) -> None:
    """Six short training samples and four evaluation samples for every task, in the task's format."""
    for task in resolve_order(recipe, root).stream.tasks:
        _WRITERS[task.format](root, task)


def _write_builtin(root: Path, task: TaskConfig) -> None:
    """It is generated."""


def _write_tasl(root: Path, task: TaskConfig) -> None:
    number = f"task{task.name}" if task.name.isdecimal() else task.name
    for split in SPLITS["tasl"]:
        write_json(root / split / f"{number}_T5.json", records("input", "output", 6))


def _write_sgd(root: Path, task: TaskConfig) -> None:
    for split in ("train", "test"):
        stem = root / f"SGD_single_service_{split}" / f"{task.name}-{split}"
        write_json(Path(f"{stem}-LLM_T5.json"), records("input", "output", 6))
        write_lines(Path(f"{stem}.idx"), [f"d|||d|||{n // 2}|||none|||{task.name}|||slot{n % 2}" for n in range(6)])


def _write_trace(root: Path, task: TaskConfig) -> None:
    for split in SPLITS["trace"]:
        write_json(root / task.name / f"{split}.json", records("prompt", "answer", 6))


def _write_text(root: Path, task: TaskConfig) -> None:
    for split in ("train", "test"):
        write_lines(root / str(task.path) / f"{split}.txt", [f"a document about {task.name} {i}" for i in range(6)])


def _write_jsonl(root: Path, task: TaskConfig) -> None:
    path = root / str(task.path)
    for name in (path.name, f"{path.stem}.test.jsonl"):
        items = [{task.reader.input_field: f"say {i}", task.reader.output_field: f"that is {i}"} for i in range(6)]
        write_lines(path.with_name(name), as_lines(items))


_WRITERS = {
    "builtin": _write_builtin,
    "tasl": _write_tasl,
    "sgd": _write_sgd,
    "trace": _write_trace,
    "text": _write_text,
    "jsonl": _write_jsonl,
}


def changes_for(name: str, folder: Path) -> list[str]:
    """The settings that let a recipe run here: its data, a tiny model of its family."""
    recipe, _ = load_recipe(name)
    root = folder / "data"
    write_data(root, recipe)
    model = FAMILIES[recipe.model.name_or_path]
    given = [f"stream.root={root}", f"model.name_or_path={model}"]
    return given if recipe.stream.root is not None or recipe.stream.order is not None else given[1:]


@pytest.mark.parametrize("name", shipped_recipes())
def test_it_takes_data_and_a_model_from_the_command_line(name: str, tmp_path: Path) -> None:
    changes = changes_for(name, tmp_path)
    changes += EXTRA.get(name, ())
    recipe, folder = load_recipe(name, changes)
    published, _ = load_recipe(name)
    assert recipe.train == published.train or name in EXTRA
    assert recipe.method == published.method
    # So few samples make no fifty steps, and a machine without GPUs is not asked how many it has.
    short, _ = load_recipe(name, [*changes, "train.warmup_steps=0", "launch.processes=1"])
    check_stream_and_model(resolve_order(short, folder), folder)


def test_there_is_a_recipe_for_every_published_order() -> None:
    wanted = {f"standard-order{n}" for n in (1, 2, 3)} | {f"long-order{n}" for n in (4, 5, 6)}
    wanted |= {"superni-order1", "superni-order2", "trace"} | {f"sgd-order{n}" for n in range(1, 6)}
    assert wanted <= set(shipped_recipes())
    for name in wanted - {"trace"}:
        number = name[-1]
        benchmark = name.partition("-")[0]
        order = f"{benchmark}-{number}" if benchmark in ("superni", "sgd") else int(number)
        assert load_recipe(name)[0].stream.order == order


def test_recipes_of_long_answers_cut_them_as_their_sources_do() -> None:
    recipes = {name: load_recipe(name)[0].train for name in shipped_recipes()}
    cutting = {name for name, train in recipes.items() if train.long_answers == "cut"}
    assert cutting == {"instruct-code", "llama2-7b-kif", "superni-order1", "superni-order2", "trace"} | SGD


def test_recipes_of_one_benchmark_differ_in_order_alone() -> None:
    for names in (SGD, {"superni-order1", "superni-order2"}):
        first, *others = (load_recipe(name)[0] for name in sorted(names))
        for other in others:
            stream = replace(other.stream, order=first.stream.order)
            assert replace(other, stream=stream, output_dir=first.output_dir) == first


def test_recipes_learn_the_empty_answers_of_their_data() -> None:
    recipes = {name: load_recipe(name)[0].stream for name in shipped_recipes()}
    assert {name for name, stream in recipes.items() if stream.empty_answers == "keep"} == {
        "llama2-7b-kif", "superni-order1", "superni-order2"
    }  # fmt: skip


def test_trace_learns_every_task_for_its_own_number_of_epochs() -> None:
    tasks = load_recipe("trace")[0].stream.tasks
    assert [task.epochs for task in tasks] == [5, 3, 7, 5, 3, 5, 5, 7]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in REPRESENTATIVES else pytest.mark.slow) for name in shipped_recipes()],
)
def test_it_runs_to_its_end_with_a_tiny_model(name: str, tmp_path: Path, zygote: Zygote) -> None:
    changes = [*changes_for(name, tmp_path), *SMALL, *EXTRA.get(name, ()), f"output_dir={tmp_path / 'run'}"]
    options = [word for change in changes for word in ("--set", change)]
    outcome = zygote.run(["run", name, *options], tmp_path)
    assert outcome.codes == [0], outcome.output[0][-3000:]
    metrics: dict[str, Any] = json.loads((tmp_path / "run" / "metrics.json").read_text())
    tasks = [task.name for task in resolve_order(*load_recipe(name)).stream.tasks]
    assert metrics["tasks"] == tasks
    assert len(metrics["accuracy_matrix"]) == len(tasks) + 1
    assert metrics["average_performance"] is not None


def test_a_task_may_have_its_own_number_of_epochs(tmp_path: Path, zygote: Zygote) -> None:
    tasks = "[{name: spring, format: builtin}, {name: summer, format: builtin, epochs: 3}]"
    changes = [f"stream.tasks={tasks}", "stream.max_train_samples=8", "train.micro_batch_size=4", "train.epochs=2"]
    changes += ["launch.processes=1", "stream.max_eval_samples=2", f"output_dir={tmp_path / 'run'}"]
    outcome = zygote.run(["run", "quickstart", *(f"--set={change}" for change in changes)], tmp_path)
    assert outcome.codes == [0], outcome.output[0][-3000:]
    timings = json.loads((tmp_path / "run" / "metrics.json").read_text())["timings"]
    assert [entry["steps"] for entry in timings] == [4, 6]
