"""Which methods compose: the table, and the sentence that a recipe is refused with."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import pytest

from cl_dist.config.load import dump_recipe, load_recipe
from cl_dist.errors import BadInput
from cl_dist.methods.catalogue import built_in
from cl_dist.methods.config import Role, exclusion

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"
SENSIBLE = [
    ("olora", "migu"),
    ("inclora", "migu"),
    ("replay", "migu"),
    ("replay", "kif"),
    ("replay", "tasl"),
    ("migu", "kif"),
    ("inclora", "replay"),
    ("olora", "replay"),
    ("sequential", "per_task"),
    ("ewc", "migu"),
    ("lwf", "replay"),
    ("inclora", "lwf"),
    ("inclora", "agem"),
    ("olora", "lwf"),
    ("olora", "agem"),
]


def excluded(one: str, other: str) -> str | None:
    """Why two methods do not go together."""
    return exclusion(built_in()[one], built_in()[other])


def load(names: Sequence[str]) -> None:
    """Read a recipe with these methods."""
    methods = ", ".join(f"{{name: {name}}}" for name in names)
    load_recipe("quickstart", [f"method=[{methods}]", "model.lora={r: 4}"])


@pytest.mark.parametrize("pair", SENSIBLE, ids="+".join)
def test_compatible_methods_compose_in_either_order(pair: tuple[str, str]) -> None:
    assert excluded(*pair) is None
    load(pair)
    load(pair[::-1])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("inclora", "olora"), "inclora and olora do not compose: both train a new adapter"),
        (("migu", "olora", "kif"), "olora and kif do not compose: fusion mixes"),
        (("recurrent_kif", "inclora"), "recurrent_kif and inclora do not compose: fusion mixes"),
        (("olora", "ewc"), "olora and ewc do not compose: ewc holds back weights that past tasks have trained"),
        (("ewc", "inclora"), "ewc and inclora do not compose"),
        (("replay", "per_task"), "replay and per_task do not compose: per_task starts every task"),
        (("multi_task", "migu"), "multi_task and migu do not compose: multi_task learns all tasks at once"),
        (("per_task", "multi_task"), "per_task and multi_task do not compose: the one"),
        (("replay", "recurrent_kif"), "replay and recurrent_kif do not compose: recurrent_kif has a memory"),
        (("ewc", "migu", "kif"), "ewc before kif would hold on to the weights before the fusion and undo it"),
        (("tasl", "kif"), "tasl and kif do not compose: kif, tasl and recurrent_kif all fuse weights"),
    ],
)
def test_incompatible_methods_are_refused_by_name(names: tuple[str, ...], message: str) -> None:
    with pytest.raises(BadInput, match=f"^method: {re.escape(message)}"):
        load(names)


def test_no_method_excludes_itself_and_plain_ones_go_with_all() -> None:
    assert [name for name in built_in() if excluded(name, name) is not None] == []
    assert [name for name in built_in() if excluded("sequential", name) is not None] == []


def test_a_reason_is_the_same_in_either_order() -> None:
    assert [pair for pair in combinations(built_in(), 2) if excluded(*pair) != excluded(*pair[::-1])] == []


def test_every_role_belongs_to_a_method() -> None:
    assert {role for cls in built_in().values() for role in cls.ROLES} == set(Role)


def test_the_page_has_the_same_pairs() -> None:
    """A mark in the table of docs/methods.md where two methods compose, `–` where they do not."""
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(("| + |", "| `"))]
    table = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in rows if line.count("|") > 8]
    columns = table[0][1:]
    found = {(row[0], name): mark for row in table[1:] for name, mark in zip(columns, row[1:], strict=True)}
    assert set(built_in()) - {"sequential"} <= set(columns)
    assert {row[0] for row in table[1:]} == set(columns)
    for one, other in combinations(columns, 2):
        expected = "yes" if excluded(one, other) is None else "–"
        assert (found[one, other], found[other, one]) == (expected, expected), (one, other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["method.name=olora"],
            "method: olora trains new LoRA adapters in every task, but there is no model.lora",
        ),
        (
            ["method=[{name: replay}, {name: kif, replay_ratio: 0.02}]"],
            "method: replay and kif with replay_ratio 0.02 do not compose: both mix past samples in; give one of them",
        ),
        (["method.name=per_task", "train.keep_optimizer=true"], "train.keep_optimizer: true carries AdamW's moments"),
        (
            ["method.name=inclora", "model.lora={r: 4}", "train.keep_optimizer=true"],
            "train.keep_optimizer: true carries AdamW's moments into the next task, but with inclora that task starts",
        ),
        (
            ["method={name: replay, policy: reservoir}"],
            "method.memory_size: missing; policy reservoir needs the",
        ),
        (["method={name: replay, memory_size: 9}"], "method.memory_size: 9 has a meaning for policy reservoir only"),
        (
            ["method={name: replay, policy: reservoir, memory_size: 9, ratio: 0.5}"],
            "method.ratio: 0.5 has a meaning for policy quota only; reservoir takes memory_size",
        ),
        (
            ["method={name: ewc, gamma: 0.5}"],
            "method.gamma: 0.5 has a meaning for variant online only; separate forgets nothing",
        ),
        (
            [
                "method.name=multi_task",
                "stream.tasks=[{name: a, format: builtin, epochs: 2}, {name: b, format: builtin}]",
            ],
            "stream.tasks: multi_task learns all tasks together, and their epochs differ (a 2, b 8)",
        ),
        (["method={name: replay, ratio: 0}"], "method.ratio: 0 is not allowed; allowed: a number, above 0, at most 1"),
        (["method={name: olora, lambda1: -1}"], "method.lambda1: -1 is not allowed; allowed: a number, at least 0"),
    ],
)
def test_a_recipe_is_refused(changes: list[str], message: str) -> None:
    with pytest.raises(BadInput, match=f"^{re.escape(message)}"):
        load_recipe("quickstart", changes)


@pytest.mark.parametrize(
    "changes",
    [
        ["method={name: replay, policy: reservoir, memory_size: 9}"],
        ["method={name: ewc}"],
        ["method={name: ewc, variant: online, gamma: 0.5}"],
        ["method.name=multi_task", "stream.tasks=[{name: a, format: builtin, epochs: 2}]"],
    ],
)
def test_the_config_that_a_run_writes_is_accepted_again(changes: list[str], tmp_path: Path) -> None:
    """There every setting is spelt out, those that nothing reads too."""
    recipe, _ = load_recipe("quickstart", changes)
    path = tmp_path / "config.yaml"
    path.write_text(dump_recipe(recipe))
    assert load_recipe(str(path))[0] == recipe
