"""Settings of methods that differ between tasks: read, checked, written out, and dropped with their method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import built_in
from cl_dist.methods.composed import compose
from cl_dist.methods.config import VariedConfig
from cl_dist.methods.kif.config import KifConfig
from cl_dist.methods.olora.config import OLoraConfig
from cl_dist.methods.protocol import Method
from cl_dist.state.preflight import changed_settings
from cl_dist.state.stored_files import as_plain, stored_recipe
from cl_dist.sweep.grid import Request, build_grid
from cl_dist.tasks.orders import resolve_order

LORA = "model.lora={r: 8}"
OLORA = {"mnli": {"lambda1": 5}, "copa": {"lambda2": 0.1}}


def load(*changes: str) -> Recipe:
    return resolve_order(*load_recipe("long-order4", [LORA, *changes]))


def test_a_task_has_its_own_settings_and_those_of_the_others() -> None:
    (method,) = load(f"method={{name: olora, lambda1: 0.3, by_task: {OLORA}}}").method
    assert isinstance(method, OLoraConfig)
    found = {task: (own.lambda1, own.lambda2) for task in ("mnli", "copa", "cb") for own in [method.for_task(task)]}
    assert found == {"mnli": (5, 0.0), "copa": (0.3, 0.1), "cb": (0.3, 0.0)}


def test_a_task_does_not_inherit_from_the_one_before() -> None:
    (method,) = compose(load(f"method={{name: olora, by_task: {OLORA}}}").method).methods
    seen = []
    for task in ("mnli", "copa", "cb", "mnli"):
        method.follow(task)
        seen.append((method.config.lambda1, method.config.lambda2))
    assert seen == [(5, 0.0), (0.5, 0.1), (0.5, 0.0), (5, 0.0)]


def test_a_method_without_settings_follows_too() -> None:
    Method().follow("mnli")


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ({"name": "olora", "by_task": {"coppa": {"lambda2": 1}}}, 'method.by_task: "coppa" is not a task of the'),
        (
            {"name": "olora", "by_task": {"copa": {"lambda3": 1}}},
            "method.by_task.copa.lambda3: unknown key; by_task",
        ),
        (
            {"name": "olora", "by_task": {"copa": {"lambda2": -1}}},
            "copa.lambda2: -1 is not allowed; allowed: a number",
        ),
        ({"name": "olora", "by_task": {"copa": {"lambda2": "1"}}}, 'copa.lambda2: "1" is not allowed'),
        ({"name": "olora", "by_task": {"copa": 3}}, "method.by_task: 3 is not a mapping of settings"),
        ({"name": "kif", "by_task": {"copa": {"units": "row"}}}, "copa.units: cannot differ between the tasks"),
        ({"name": "kif", "by_task": {"copa": {"name": "tasl"}}}, "copa.name: cannot differ between the tasks"),
        ({"name": "kif", "by_task": {"copa": {"weight_new": 0.5}}}, "by_task.copa.weight_new: 0.5 and weight_old 0.7"),
        ({"name": "replay", "by_task": {"copa": {"ratio": 0.5}}}, "method.by_task: unknown key"),
    ],
)
def test_an_impossible_setting_is_refused_with_its_key(method: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput) as error:
        load(f"method={method}")
    assert message in str(error.value)


def test_the_method_is_named_by_its_place_in_a_list() -> None:
    methods = [{"name": "olora"}, {"name": "migu", "by_task": {"nope": {"threshold": 0.5}}}]
    with pytest.raises(BadInput, match=r'^method\.1\.by_task: "nope" is not a task'):
        load(f"method={methods}")


def test_a_penalty_on_adapters_in_one_task_needs_adapters() -> None:
    with pytest.raises(BadInput, match=r"method\.orthogonal: 0\.5 weighs a penalty on LoRA's matrices"):
        load("model.lora=null", "method={name: kif, by_task: {copa: {orthogonal: 0.5}}}")


@pytest.mark.parametrize(
    ("method", "values", "expected"),
    [
        ("fusion: hard, threshold: 30", "fusion: adaptive, tau: 0.5", ("adaptive", 20.0, 0.5)),
        ("fusion: adaptive, tau: 0.5", "fusion: hard, threshold: 30", ("hard", 30.0, 0.25)),
        ("fusion: hard, threshold: 30", "fusion: hard", ("hard", 30.0, 0.25)),
    ],
)
def test_a_task_may_use_the_other_fusion(method: str, values: str, expected: tuple[str, float, float]) -> None:
    (kif,) = load(f"method={{name: kif, {method}, by_task: {{copa: {{{values}}}}}}}").method
    assert isinstance(kif, KifConfig)
    own = kif.for_task("copa")
    assert (own.fusion, own.threshold, own.tau) == expected
    assert kif.for_task("mnli") == kif


def test_a_task_may_not_set_what_its_fusion_does_not_read() -> None:
    with pytest.raises(BadInput, match=r"method\.by_task\.copa\.threshold: 25\.0 is not used: fusion: adaptive"):
        load("method={name: kif, fusion: hard, by_task: {copa: {fusion: adaptive, threshold: 25}}}")


def test_another_method_drops_them_and_a_relative_keeps_them() -> None:
    (migu,) = load(f"method={{name: olora, by_task: {OLORA}}}", "method.name=migu").method
    assert isinstance(migu, VariedConfig)
    assert migu.by_task == {}
    kif, changes = {"copa": {"threshold": 30.0, "tau": 0.5}}, "method.name=recurrent_kif"
    (recurrent,) = load(f"method={{name: kif, by_task: {kif}}}", changes).method
    assert isinstance(recurrent, VariedConfig)
    assert recurrent.by_task == {"copa": {"threshold": 30.0}}


def test_a_run_stores_them_and_a_resume_with_others_is_refused(tmp_path: Path) -> None:
    recipe, other = (load(f"method={{name: olora, by_task: {tasks}}}") for tasks in (OLORA, {"mnli": {"lambda1": 4}}))
    path = tmp_path / "config.yaml"
    path.write_text(dump_recipe(recipe))
    assert yaml.safe_load(path.read_text())["method"][0]["by_task"] == OLORA
    assert stored_recipe(path) == recipe
    assert changed_settings(as_plain(recipe), as_plain(other)) == [
        "method[0].by_task.mnli.lambda1: 5 in the run, 4 now",
        "method[0].by_task.copa.lambda2: 0.1 in the run, not set now",
    ]


def test_a_sweep_gives_them_to_one_row(tmp_path: Path) -> None:
    request = Request(
        recipe="long-order4", changes=[LORA], methods="olora,plain=olora", orders="4,6", seeds="1", out=tmp_path,
        method_changes=[f"olora:method.by_task={OLORA}"],
    )  # fmt: skip
    cells = build_grid(request).cells
    found = {(cell.order, cell.method): cell.recipe.method[0].by_task for cell in cells}  # type: ignore[union-attr]
    assert found == {(o, m): (OLORA if m == "olora" else {}) for o in ("order4", "order6") for m in ("olora", "plain")}


def test_every_setting_that_may_vary_by_task_exists() -> None:
    for name, cls in built_in().items():
        varied = getattr(cls, "VARIED", ())
        assert set(varied) <= set(cls.__pydantic_fields__), name  # type: ignore[attr-defined]
    assert "tau" in KifConfig.VARIED


@pytest.mark.parametrize("name", [name for name, cls in built_in().items() if issubclass(cls, VariedConfig)])
def test_every_method_with_settings_by_task_checks_them(name: str) -> None:
    with pytest.raises(BadInput, match=r"method\.by_task\.copa\.nope: unknown key"):
        load(f"method={{name: {name}, by_task: {{copa: {{nope: 1}}}}}}")


def test_epochs_of_the_tasks_that_an_order_names() -> None:
    tasks = load("stream.epochs_by_task={mnli: 2}", "method.name=olora").stream.tasks
    assert {task.name: task.epochs for task in tasks if task.epochs} == {"mnli": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stream.epochs_by_task={mnlii: 2}"], 'stream.epochs_by_task: "mnlii" is no task of order 4'),
        (["stream.epochs_by_task={mnli: 0}"], "0 is not allowed; allowed: a mapping of names, each to a whole number"),
        (
            ["stream.order=null", "stream.tasks=[{name: a, format: builtin}]", "stream.epochs_by_task={a: 2}"],
            "tasks[].epo",
        ),
        (["method.name=multi_task", "stream.epochs_by_task={mnli: 2}"], "their epochs differ (mnli 2, cb 1"),
        (["eval.general={tasks: [hellaswag], after: [nope]}"], 'eval.general.after: "nope" is none of all'),
    ],
)
def test_settings_that_name_no_task_of_the_order_are_refused(changes: list[str], message: str) -> None:
    with pytest.raises(BadInput) as error:
        load(*changes)
    assert message in str(error.value)
