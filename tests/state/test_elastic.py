"""Splits of the global batch on resume: which are chosen, which are refused, and the messages."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from cl_dist.config.schema import ModelConfig, Recipe, StreamConfig, TaskConfig, TrainConfig, ZeroConfig
from cl_dist.errors import BadInput
from cl_dist.methods.migu.config import MiguConfig
from cl_dist.state.elastic import appended, fitted, resumption, segment, with_segments
from cl_dist.state.manifest import Manifest, Segment

FOLDER = Path("runs/r")


def make_recipe(size: int = 4, accumulation: int = 1, stage: int = 2, **changes: Any) -> Recipe:
    train = {"micro_batch_size": size, "gradient_accumulation": accumulation, **changes.pop("train", {})}
    return Recipe(
        model=ModelConfig(name_or_path="builtin:llama-tiny"),
        stream=StreamConfig(tasks=(TaskConfig(name="a", format="builtin"),)),
        train=TrainConfig(**train),
        zero=ZeroConfig(stage=stage),  # type: ignore[arg-type]
        output_dir="unused",
        **changes,
    )


def at(task: int, step: int, ranks: int = 2, stage: int = 2) -> Segment:
    return segment(make_recipe(size=8 // ranks, stage=stage), ranks, task, step)


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 6), st.integers(1, 48))
def test_the_global_batch_is_kept_or_the_resume_refused(size: int, accumulation: int, before: int, ranks: int) -> None:
    train, batch = TrainConfig(micro_batch_size=size, gradient_accumulation=accumulation), size * accumulation * before
    if batch % ranks:
        with pytest.raises(BadInput, match=f"batch of {batch} samples, which {ranks} ranks cannot"):
            fitted(train, batch, ranks, FOLDER)
        return
    now = fitted(train, batch, ranks, FOLDER)
    assert now.micro_batch_size * now.gradient_accumulation * ranks == batch
    assert now.micro_batch_size <= size
    assert replace(now, micro_batch_size=size, gradient_accumulation=accumulation) == train
    if ranks == before:
        assert now == train
    if (batch // ranks) % size == 0:
        assert now.micro_batch_size == size


@pytest.mark.parametrize(
    ("before", "recipe", "ranks", "split"),
    [
        ((4, 1, 2), (4, 1), 1, (4, 2)),
        ((4, 2, 1), (4, 1), 2, (4, 1)),  # the original recipe on the original ranks
        ((4, 2, 1), (4, 1), 1, (4, 2)),  # and again on those of the restart
        ((6, 1, 2), (6, 1), 3, (4, 1)),
        ((4, 1, 3), (4, 1), 2, (3, 2)),
        ((4, 1, 2), (2, 1), 2, (2, 2)),  # less memory on the same ranks
        ((4, 2, 2), (8, 1), 2, (8, 1)),
        ((5, 1, 7), (5, 1), 5, (1, 7)),
    ],
)
def test_which_split_is_taken(
    before: tuple[int, int, int], recipe: tuple[int, int], ranks: int, split: tuple[int, int]
) -> None:
    earlier = segment(make_recipe(*before[:2]), before[2])
    now = resumption(make_recipe(*recipe), earlier, ranks, FOLDER).recipe.train
    assert (now.micro_batch_size, now.gradient_accumulation) == split


def test_ranks_that_cannot_share_the_batch_are_told_which_numbers_can() -> None:
    with pytest.raises(BadInput, match=r"the run in runs/r has .* allowed: 1, 2, 3, 4, 6 or 12$"):
        fitted(TrainConfig(micro_batch_size=6), 12, 5, FOLDER)
    with pytest.raises(BadInput, match=r"allowed: 1, 2, 3, 4, 5, 6, 8, 9, 10, 12, 15, 18, \.\.\. or 360$"):
        fitted(TrainConfig(micro_batch_size=6), 360, 7, FOLDER)


def test_a_recipe_with_another_global_batch_is_refused() -> None:
    message = (
        r"train\.micro_batch_size 4 times train\.gradient_accumulation 3 does not divide .* in runs/r, .* 8 samples"
    )
    with pytest.raises(BadInput, match=message):
        fitted(TrainConfig(micro_batch_size=4, gradient_accumulation=3), 8, 2, FOLDER)


def note(before: Segment, recipe: Recipe, ranks: int) -> str | None:
    return resumption(recipe, before, ranks, FOLDER).note


def test_what_is_new_is_said_in_one_line() -> None:
    before = segment(make_recipe(stage=1), 2)
    assert note(before, make_recipe(stage=1), 2) is None
    assert note(before, make_recipe(stage=3), 1) == (
        "resuming with ranks 1 (2 before), zero.stage 3 (1 before), train.gradient_accumulation 2 (1 before); "
        "the global batch stays 8 samples"
    )
    again = segment(make_recipe(accumulation=2), 1)
    assert note(again, make_recipe(), 1) == (
        "resuming with train.gradient_accumulation 2 (1 in the recipe); the global batch stays 8 samples"
    )


def test_only_another_split_draws_other_numbers() -> None:
    before = segment(make_recipe(stage=1), 2)
    assert not resumption(make_recipe(stage=3), before, 2, FOLDER).new_split
    assert resumption(make_recipe(stage=1), before, 1, FOLDER).new_split
    assert resumption(make_recipe(2, 2, stage=1), before, 2, FOLDER).new_split


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"train": {"loss_average": "micro_batch"}}, "train.loss_average: micro_batch"),
        ({"method": (MiguConfig(name="migu", mask_scope="micro_batch"),)}, "method.mask_scope: micro_batch"),
        ({"method": (MiguConfig(name="migu", count_padding=True),)}, "method.count_padding: true"),
    ],
)
def test_what_depends_on_the_split_forbids_another_one(changes: dict[str, Any], setting: str) -> None:
    recipe = make_recipe(**changes)
    before = segment(recipe, 2)
    assert resumption(replace(recipe, zero=ZeroConfig(stage=3)), before, 2, FOLDER).recipe.train == recipe.train
    with pytest.raises(BadInput) as caught:
        resumption(recipe, before, 1, FOLDER)
    assert str(caught.value) == (
        f"--resume: with {setting} the results depend on how the global batch is split, so the run in runs/r can "
        "only resume with the same split: 2 ranks, train.micro_batch_size 4, train.gradient_accumulation 1; now it "
        "would be 1 rank, train.micro_batch_size 4, train.gradient_accumulation 2"
    )


def test_one_mask_per_step_is_the_same_under_both_scopes() -> None:
    """Without accumulation before and after, a micro-batch is a whole step."""
    recipe = make_recipe(8, method=(MiguConfig(name="migu", mask_scope="micro_batch"),))
    before = segment(make_recipe(4), 2)
    assert resumption(recipe, before, 1, FOLDER).recipe.train.gradient_accumulation == 1


def test_segments_say_who_computed_which_step() -> None:
    first = at(0, 0)
    assert appended((first,), at(0, 5)) == (first,)
    two = appended((first,), at(0, 5, ranks=1))
    assert two == (first, at(0, 5, ranks=1))
    three = appended(two, at(1, 2, ranks=1, stage=3))
    assert three == (*two, at(1, 2, ranks=1, stage=3))
    # After a fallback to an earlier state, later steps are computed again.
    assert appended(three, at(0, 7, ranks=1)) == two
    assert appended(three, at(0, 3)) == (first,)
    assert appended(three, at(0, 0, ranks=1)) == (at(0, 0, ranks=1),)


def test_a_run_of_format_1_gets_its_segment_from_its_recipe(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(TypeAdapter(Recipe).dump_python(make_recipe(6, 2), mode="json")))
    manifest = with_segments(Manifest(tasks=("a",), world_size=4, zero_stage=3), config)
    assert manifest.segments == (segment(make_recipe(6, 2, stage=3), 4),)
    assert manifest.segments[0].global_batch == 48
    config.unlink()
    assert with_segments(manifest, config) is manifest
