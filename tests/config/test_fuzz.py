from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from cl_dist.config.fields import settings_of
from cl_dist.config.load import load_recipe
from cl_dist.config.schema import Recipe
from tests.config.fuzz import LONG_ALIASES, MERGES, RECIPE, Mutant, fitting, judge, mutants, playground, typed, unused

EXAMPLES = 300

KNOWN = [
    'model.name_or_path="\\ud800"', 'output_dir="a\\0b"', "stream.tasks.1.path=fifo", "stream.tasks.1.path=/dev/zero",
    f"stream.tasks.1.path={'a' * 300}", f"output_dir={'a/' * 3000}", f"train.epochs=0x{'f' * 5000}",
    f"train.x={'[' * 800}",
    "output_dir=~no_such_user_here/x", "stream.root=~no_such_user_here/x", "launch.timeout_seconds=1e308",
    "train.micro_batch_size=2147483647", "train.micro_batch_size=9223372036854775808", "train.eps=1e-320",
    f"train{'.a' * 2000}=1", f"stream.tasks.{'9' * 5000}.name=x",
    "zero.deepspeed.zero_optimization.reduce_bucket_size=abc",
    "zero.deepspeed.zero_optimisation={}", "stream.tasks.1.path=loop", "output_dir=loop",
]  # fmt: skip
"""One of every kind that was an internal error, a hang or ignored."""


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with playground() as name:
        yield name


@pytest.mark.parametrize("change", KNOWN, ids=lambda change: change[:40])
def test_what_once_broke_the_pre_flight_is_refused(change: str, folder: Path) -> None:
    outcome = judge(
        Mutant(RECIPE.encode(), (*(["train.gradient_accumulation=9"] if "micro" in change else []), change)), folder
    )
    assert outcome.kind == "refused", outcome


@pytest.mark.parametrize("bomb", [MERGES, LONG_ALIASES], ids=["merged keys", "aliases of a long text"])
def test_a_document_whose_aliases_explode_is_refused(bomb: str, folder: Path) -> None:
    outcome = judge(Mutant((bomb + RECIPE).encode()), folder)
    assert outcome.kind == "refused", outcome
    assert ("unknown key" if bomb == MERGES else "counting each use of an alias") in outcome.detail


def test_a_recipe_that_is_a_pipe_a_device_or_huge_is_refused(folder: Path) -> None:
    (folder / "pipe.yaml").symlink_to("fifo")
    (folder / "zero.yaml").symlink_to("/dev/zero")
    with open(folder / "huge.yaml", "wb") as file:
        file.truncate(2**40)
    for name in ("pipe.yaml", "zero.yaml", "huge.yaml"):
        outcome = judge(Mutant(name), folder)
        assert outcome.kind == "refused", (name, outcome)


def test_the_judge_sees_what_is_wrong(folder: Path) -> None:
    """A recipe that is fine, with a home folder of its own, and one that is not."""
    assert judge(Mutant(RECIPE.encode(), ("output_dir=~/x", "train.epochs=3")), folder).kind == "accepted"
    assert judge(Mutant(RECIPE.encode(), ("train.epochs=0",)), folder).kind == "refused"


@pytest.mark.parametrize("change", ["train.epochs=3", "stream.tasks.1.name=x", "method.name=ewc", "zero.offload=true"])
def test_the_judge_sees_a_setting_that_is_not_used(change: str, folder: Path) -> None:
    (folder / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    other, _ = load_recipe("mine.yaml")
    said = unused(Mutant(RECIPE.encode(), (change,)), other, folder)
    assert said is not None
    assert said.startswith(change.partition("=")[0].replace("method.", "method.0."))


def test_every_setting_takes_every_plausible_value_or_refuses_it(folder: Path) -> None:
    outcomes = {mutant: judge(mutant, folder) for mutant in single_changes()}
    assert [(mutant.changes, outcome) for mutant, outcome in outcomes.items() if not outcome.good] == []
    accepted = {key(mutant) for mutant, outcome in outcomes.items() if outcome.kind == "accepted"}
    assert len(accepted) > 0.8 * len({key(mutant) for mutant in outcomes})  # the others need a second setting


def key(mutant: Mutant) -> str:
    """The setting that a mutant is about."""
    return mutant.changes[-1].partition("=")[0]


def single_changes() -> Iterator[Mutant]:
    """Every setting of the schema alone, behind the method that has it."""
    for setting in settings_of(Recipe):
        method = setting.key.removeprefix("method(").partition(")")[0] if setting.key.startswith("method(") else None
        before = () if method is None else ("model.lora={r: 2}", f"method={{name: {method}}}")
        for value in fitting(setting.allowed):
            yield Mutant(RECIPE.encode(), (*before, f"{typed(setting)}={value}"))


@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutant=mutants())
def test_a_recipe_is_refused_or_used(mutant: Mutant, folder: Path) -> None:
    outcome = judge(mutant, folder)
    assert outcome.good, outcome
