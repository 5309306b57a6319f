from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.config.fuzz import LONG_ALIASES, MERGES, RECIPE, Mutant, judge, mutants, playground

EXAMPLES = 600

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
def test_a_text_that_multiplies_itself_is_refused(bomb: str, folder: Path) -> None:
    outcome = judge(Mutant((bomb + RECIPE).encode()), folder)
    assert outcome.kind == "refused", outcome


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


@settings(max_examples=EXAMPLES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(mutant=mutants())
def test_a_recipe_is_refused_or_used(mutant: Mutant, folder: Path) -> None:
    outcome = judge(mutant, folder)
    assert outcome.good, outcome
