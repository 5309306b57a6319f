"""Resuming on a different number of ranks or under a different ZeRO stage, with the same global batch.

Which samples a step trains on depends only on the global batch (`cl_dist.tasks.plan`), so a run keeps its global batch
and divides it anew. Imports nothing heavy: `preflight` needs this before any model is built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from cl_dist.config.schema import Recipe, TrainConfig
from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.state.manifest import Manifest, Segment
from cl_dist.state.stored_files import stored_recipe

_SHOWN_COUNTS = 12


@dataclass(frozen=True)
class Resumption:
    """How a run resumes."""

    recipe: Recipe
    """The recipe with the split of the global batch that the current ranks use."""
    note: str | None
    """One line for the user if the split, the ranks or the stage differ from before or from the recipe."""
    new_split: bool
    """Whether the global batch is divided differently than before; random numbers per rank (dropout) then differ."""


def segment(recipe: Recipe, ranks: int, task: int = 0, step: int = 0) -> Segment:
    """The segment of a run that begins at a step of a task with this recipe on `ranks` ranks."""
    return Segment(
        task=task,
        step=step,
        world_size=ranks,
        zero_stage=recipe.zero.stage,
        micro_batch_size=recipe.train.micro_batch_size,
        gradient_accumulation=recipe.train.gradient_accumulation,
    )


def with_segments(manifest: Manifest, config: Path) -> Manifest:
    """The manifest; one of format 1 has no segments, so its first one is derived from the stored recipe `config`."""
    if manifest.segments:
        return manifest
    # Releases that wrote format 1 could only resume with the same ranks and the same split.
    first = replace(segment(stored_recipe(config), manifest.world_size), zero_stage=manifest.zero_stage)
    return replace(manifest, segments=(first,))


def appended(segments: Sequence[Segment], newest: Segment) -> tuple[Segment, ...]:
    """The segments after training resumes with `newest`, which replaces what earlier ones computed from there on."""
    place = (newest.task, newest.step)
    kept = tuple(segment for segment in segments if (segment.task, segment.step) < place)
    return kept if kept and kept[-1].same_layout(newest) else (*kept, newest)


def resumption(recipe: Recipe, before: Segment, ranks: int, folder: Path) -> Resumption:
    """How the run in `folder`, whose last steps belong to the segment `before`, resumes on `ranks` ranks.

    Raises `BadInput` if the global batch cannot be kept, or if a setting makes results depend on how it is split.
    """
    train = fitted(recipe.train, before.global_batch, ranks, folder)
    _refuse_split_dependent(recipe, before, replace(recipe, train=train), ranks, folder)
    recipe, asked = replace(recipe, train=train), recipe.train
    now = segment(recipe, ranks)
    return Resumption(recipe, _note(before, asked, now), now.split != before.split)


def fitted(train: TrainConfig, global_batch: int, ranks: int, folder: Path) -> TrainConfig:
    """`train` with the split of the global batch over `ranks` that is closest to its own.

    `micro_batch_size` becomes the largest divisor of a rank's share that does not exceed its old value, and
    `gradient_accumulation` follows. Raises `BadInput` if the global batch cannot be divided among the ranks.
    """
    size, accumulation = train.micro_batch_size, train.gradient_accumulation
    if global_batch % (size * accumulation):
        raise BadInput(
            f"--resume: train.micro_batch_size {size} times train.gradient_accumulation {accumulation} does not divide "
            f"the global batch of the run in {folder}, which stays {global_batch} samples; allowed are divisors of it"
        )
    share, rest = divmod(global_batch, ranks)
    if rest:
        raise BadInput(
            f"--resume: the run in {folder} has a global batch of {global_batch} samples, which {ranks} ranks cannot "
            f"share evenly; allowed: {_choices(_divisors(global_batch))}"
        )
    size = max(divisor for divisor in _divisors(share) if divisor <= size)
    return replace(train, micro_batch_size=size, gradient_accumulation=share // size)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _choices(counts: Sequence[int]) -> str:
    """`1, 2, 4 or 8`; a long list is shortened in the middle."""
    long = len(counts) > _SHOWN_COUNTS
    return listed([*counts[:_SHOWN_COUNTS], "...", counts[-1]] if long else counts, last="or")


def _refuse_split_dependent(recipe: Recipe, before: Segment, after: Recipe, ranks: int, folder: Path) -> None:
    now = segment(after, ranks)
    if now.split == before.split:
        return
    setting = _split_dependent(recipe, max(before.gradient_accumulation, now.gradient_accumulation) > 1)
    if setting is not None:
        raise BadInput(
            f"--resume: with {setting} the results depend on how the global batch is split, so the run in {folder} "
            f"can only resume with the same split: {_spelt(before)}; now it would be {_spelt(now)}"
        )


def _split_dependent(recipe: Recipe, accumulates: bool) -> str | None:
    """A setting with which gradients depend on how the global batch is split; None if there is no such setting."""
    if recipe.train.loss_average == "micro_batch":
        return "train.loss_average: micro_batch"
    for method in recipe.method:
        setting = method.depends_on_split(accumulates)
        if setting is not None:
            return f"method.{setting}"
    return None


def _spelt(layout: Segment) -> str:
    ranks, size, accumulation = layout.split
    plural = "" if ranks == 1 else "s"
    return f"{ranks} rank{plural}, train.micro_batch_size {size}, train.gradient_accumulation {accumulation}"


def _note(before: Segment, asked: TrainConfig, now: Segment) -> str | None:
    """What differs from before or from the recipe, as one sentence."""
    changes = [
        _change("ranks", now.world_size, before.world_size, now.world_size),
        _change("zero.stage", now.zero_stage, before.zero_stage, now.zero_stage),
        _change("train.micro_batch_size", now.micro_batch_size, before.micro_batch_size, asked.micro_batch_size),
        _change(
            "train.gradient_accumulation",
            now.gradient_accumulation,
            before.gradient_accumulation,
            asked.gradient_accumulation,
        ),
    ]
    changed = ", ".join(filter(None, changes))
    return f"resuming with {changed}; the global batch stays {now.global_batch} samples" if changed else None


def _change(name: str, now: int, before: int, asked: int) -> str:
    if now != before:
        return f"{name} {now} ({before} before)"
    return f"{name} {now} ({asked} in the recipe)" if now != asked else ""
