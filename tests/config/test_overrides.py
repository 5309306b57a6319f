from __future__ import annotations

from itertools import permutations
from typing import Any

import pytest

from cl_dist.config.load import load_recipe
from cl_dist.config.overrides import apply_overrides, parse_override
from cl_dist.errors import BadInput
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.methods.sequential.config import SequentialConfig


def changed(recipe: dict[str, Any], *overrides: str) -> dict[str, Any]:
    """The recipe after the overrides."""
    apply_overrides(recipe, [parse_override(text) for text in overrides])
    return recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [("a.b=1e-3", 1e-3), ("a.b=[x, 'y z']", ["x", "y z"]), ("a.b={c: null}", {"c": None}), ("a.b=x=y", "x=y")],
)
def test_a_value_is_yaml(text: str, value: Any) -> None:
    override = parse_override(text)
    assert (override.path, override.value) == (("a", "b"), value)


def test_absent_and_null_components_are_made() -> None:
    recipe = changed({"model": {"lora": None}}, "model.lora.r=4", "train.epochs=2")
    assert recipe["model"] == {"lora": {"r": 4}}
    assert recipe["train"] == {"epochs": 2}


def test_entries_of_a_list_are_reached_by_their_position() -> None:
    recipe = changed({"stream": {"tasks": [{"name": "a"}, {"name": "b"}]}}, "stream.tasks.1.name=c")
    assert recipe["stream"]["tasks"] == [{"name": "a"}, {"name": "c"}]


def test_the_later_of_two_wins() -> None:
    assert changed({}, "train.epochs=2", "train.epochs=3")["train"] == {"epochs": 3}


MIGU = {"name": "migu", "threshold": 0.5, "mask": "update"}


@pytest.mark.parametrize("method", [None, {"name": "sequential"}, [{"name": "sequential"}], MIGU, [MIGU]])
@pytest.mark.parametrize("name", ["sequential", "migu"])
def test_the_method_can_be_changed_on_any_recipe(method: Any, name: str) -> None:
    recipe = changed({} if method is None else {"method": method}, f"method.name={name}")
    had_settings = method in (MIGU, [MIGU]) and name == "migu"
    assert recipe["method"] == [MIGU if had_settings else {"name": name}]


def test_changing_the_method_on_a_shipped_recipe_just_works() -> None:
    assert load_recipe("quickstart", ["method.name=migu"])[0].method == (MiguConfig(name="migu"),)
    assert load_recipe("standard-order1", ["method.name=sequential"])[0].method == (SequentialConfig(),)


def test_changing_the_method_drops_what_its_fusion_does_not_read() -> None:
    kif: dict[str, Any] = {"name": "kif", "tau": 0.5, "beta1": 0.9, "by_task": {"spring": {"tau": 0.1, "beta2": 0.8}}}
    left = {"name": "tasl", "beta1": 0.9, "by_task": {"spring": {"beta2": 0.8}}}
    assert changed({"method": dict(kif)}, "method.name=tasl")["method"] == [left]
    assert changed({"method": dict(kif)}, "method.name=kif")["method"][0]["tau"] == 0.5
    given = changed({"method": dict(kif)}, "method.name=tasl", "method.tau=0.2")["method"][0]
    assert given["tau"] == 0.2  # typed with the new name: kept, and refused
    masks = {"name": "tasl", "threshold": 30}
    assert changed({"method": dict(masks)}, "method.name=kif")["method"] == [{"name": "kif"}]
    assert changed({"method": masks | {"fusion": "hard"}}, "method.name=kif")["method"][0]["threshold"] == 30


def test_the_order_of_the_methods_name_and_settings_is_free() -> None:
    overrides = ["method.name=migu", "method.threshold=0.2", "method.mask=update"]
    for order in permutations(overrides):
        method = changed({"method": {"name": "sequential"}}, *order)["method"]
        assert method == [{"name": "migu", "threshold": 0.2, "mask": "update"}]


def test_settings_given_with_the_new_name_are_kept_even_if_wrong() -> None:
    with pytest.raises(BadInput, match=r"method.threshold: unknown key; it is a setting of kif, migu, .*tasl$"):
        load_recipe("quickstart", ["method.threshold=0.2", "method.name=sequential"])


def test_one_of_several_methods_is_reached_by_its_position() -> None:
    recipe = changed({"method": [{"name": "sequential"}, dict(MIGU)]}, "method.1.threshold=0.9")
    assert recipe["method"][1]["threshold"] == 0.9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "--set train.epochs: not of the form key=value"),
        ("=3", "--set =3: not of the form key=value"),
        ("a..b=3", "--set a..b=3: not of the form key=value"),
        ("train.clip=", '--set train.clip=: no value; write "train.clip=null" for none'),
        ("train.epochs=[1", "--set train.epochs, line 1: expected ',' or ']'"),
        ("train.epochs.x=1", "--set train.epochs.x: train.epochs is 3, which contains no settings"),
        ("stream.tasks.2.name=x", '--set stream.tasks.2.name: stream.tasks has no entry "2"; allowed: 0 to 1'),
        ("stream.tasks.-1.name=x", 'stream.tasks has no entry "-1"'),
        ("stream.tasks.2=x", '--set stream.tasks.2: stream.tasks has no entry "2"; allowed: 0 to 1'),
        ("method.threshold=0.5", "the recipe has 2 methods; say which: method.0.threshold"),
    ],
)
def test_a_bad_override_is_refused(override: str, message: str) -> None:
    recipe = {
        "train": {"epochs": 3},
        "stream": {"tasks": [{"name": "a"}, {"name": "b"}]},
        "method": [{"name": "sequential"}, {"name": "migu"}],
    }
    with pytest.raises(BadInput) as error:
        changed(recipe, override)
    assert message in str(error.value)
