from __future__ import annotations

import copy
from typing import Any

import pytest
from jsonschema import Draft7Validator

from cl_dist.config.fields import settings_of
from cl_dist.config.json_schema import recipe_schema
from cl_dist.config.load import _read_shipped, dump_recipe, load_recipe, shipped_recipes
from cl_dist.config.schema import Recipe
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.errors import BadInput

SCHEMA = recipe_schema()
VALIDATOR = Draft7Validator(SCHEMA)


def problems(recipe: Any) -> list[str]:
    return [error.json_path for error in VALIDATOR.iter_errors(recipe)]


def test_it_is_a_schema() -> None:
    Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_fit_as_they_are_and_with_all_settings(name: str) -> None:
    assert problems(_read_shipped(name)) == []
    assert problems(parse_yaml(dump_recipe(load_recipe(name)[0]), name)) == []


FITTING = [
    "method=[{name: migu}, {name: replay}]",
    "method={name: kif, by_task: {spring: {tau: 0.5}}}",
    "stream.tasks=[{name: a, format: jsonl, path: a.jsonl, input_field: question, labels: [x, y]}]",
    "stream={order: superni-1, format: tasl, root: data}",
    "model.lora={r: 4, target_modules: [q, v]}",
    "model.lora=null",
    "eval.general={tasks: [hellaswag], after: all}",
    "zero.deepspeed={zero_optimization: {overlap_comm: true}}",
]
WRONG = [
    ("train.epochs=0", "$.train.epochs"),
    ("train.epochs=1.5", "$.train.epochs"),
    ("train.learning_rate=0", "$.train.learning_rate"),
    ("train.learning_rat=1", "$.train"),
    ("train.dtype=float16", "$.train.dtype"),
    ("zero.stage=4", "$.zero.stage"),
    ("launch.processes=many", "$.launch.processes"),
    ("eval.mode=guess", "$.eval.mode"),
    ("method.name=miggu", "$.method"),
    ("method={name: migu, threshold: 1.0}", "$.method"),
    ("method={name: migu, tau: 0.5}", "$.method"),
    ("method=[]", "$.method"),
    ("stream.tasks=[{format: builtin}]", "$.stream.tasks[0]"),
    ("stream.tasks=[{name: a, format: jsonk}]", "$.stream.tasks[0].format"),
    ("stream.tasks=[{name: a, format: jsonl, input_feild: q}]", "$.stream.tasks[0]"),
    ("model.lora={r: 0}", "$.model.lora"),
    ("modle={}", "$"),
]


def changed(change: str) -> dict[str, Any]:
    key, _, value = change.partition("=")
    recipe = copy.deepcopy(_read_shipped("quickstart"))
    *parents, last = key.split(".")
    place = recipe
    for part in parents:
        place = place[part]
    place[last] = parse_yaml(value, key)
    return recipe


@pytest.mark.parametrize("change", FITTING)
def test_what_a_recipe_may_say_fits(change: str) -> None:
    load_recipe("quickstart", [change, "train.max_target_length=8"])
    assert problems(changed(change)) == []


@pytest.mark.parametrize(("change", "place"), WRONG)
def test_what_a_recipe_must_not_say_does_not_fit(change: str, place: str) -> None:
    with pytest.raises(BadInput):
        load_recipe("quickstart", [change])
    assert problems(changed(change)) == [place]


def test_classes_of_ones_own_may_have_any_settings() -> None:
    recipe = changed("stream.tasks=[{name: a, format: 'mine:Notes', tempo: 3}]")
    recipe["method"] = {"name": "mine:Drift", "strength": 0.5}
    recipe["stream"]["beat"] = 4
    assert problems(recipe) == []
    recipe["stream"]["tasks"][0]["format"] = "jsonl"
    assert sorted(problems(recipe)) == ["$.stream", "$.stream.tasks[0]"]


def test_every_setting_has_its_help_and_its_default() -> None:
    properties = SCHEMA["properties"]
    assert properties["train"]["properties"]["epochs"] == {
        "type": "integer", "minimum": 1, "default": 1, "description": "Passes over a task's training samples."
    }  # fmt: skip
    fraction = properties["train"]["properties"]["beta1"]
    assert (fraction["minimum"], fraction["exclusiveMaximum"], fraction["default"]) == (0, 1, 0.9)
    assert properties["eval"]["properties"]["mode"]["enum"] == ["auto", "likelihood", "generate", "perplexity"]
    for setting in settings_of(Recipe):
        if "(" not in setting.key:
            assert described(setting.key) == setting.help, setting.key


def described(key: str) -> str:
    place: Any = SCHEMA
    for part in key.split("."):
        place = place.get("items", place)
        place = place["anyOf"][0] if "anyOf" in place and "properties" not in place else place
        place = place["properties"][part.removesuffix("[]")]
    return str(place["description"])
