"""A run without its ranks, weights and data: goes through the index arithmetic of a job of any size in one process.

The model is the real one on the meta device, the pieces of every rank are those that DeepSpeed would make
(`sharding/maps.py`), and the methods cut them as they would in training (`Method.rehearse`). What would fail on a
cluster fails here, in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from cl_dist.config.words import listed
from cl_dist.engine.engine import refuse_layerdrop
from cl_dist.engine.trial import trial_batches
from cl_dist.errors import BadInput
from cl_dist.methods.composed import compose
from cl_dist.methods.rehearsal import Rehearsal
from cl_dist.models.check import refuse_long
from cl_dist.models.positions import longest_inputs
from cl_dist.models.structure import base_model
from cl_dist.models.training_mode import evaluation_mode
from cl_dist.planning.ranks import RankView
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.planning.trace import grouped_products
from cl_dist.sharding.maps import ShardMap

STAGES = (0, 1, 2, 3)
QUANTITIES = 3
"""Master and two moments: what every checkpoint has a span of for each piece."""
SHOWN = 3
"""Names in one sentence."""


@dataclass
class DryRun:
    """What a dry run found."""

    ranks: int
    problems: list[str] = field(default_factory=list)
    """What would not work, one sentence each."""
    notes: list[str] = field(default_factory=list)
    """What was checked, and what is worth knowing."""

    @property
    def works(self) -> bool:
        """Whether nothing would fail."""
        return not self.problems


def planned_shards(setup: Setup, shape: ModelShape, stage: Any = None) -> ShardMap:
    """The pieces of all ranks, at the recipe's stage or another."""
    return RankView(setup if stage is None else setup.varied(stage=stage), shape).map


def dry_run(setup: Setup, shape: ModelShape, samples: Mapping[str, int] | None = None) -> DryRun:
    """Go through everything that needs no numbers.

    Args:
        setup: The recipe and its ranks.
        shape: Its model.
        samples: Training samples by task; None: the data is not here.
    """
    found = DryRun(setup.world)
    for check in (_check_model, _check_shards, _check_methods, _check_buckets):
        try:
            check(setup, shape, found)
        except BadInput as refusal:
            found.problems.append(str(refusal))
    _check_samples(setup, samples, found)
    return found


def _check_model(setup: Setup, shape: ModelShape, found: DryRun) -> None:
    """The model itself: something to train, heads that can be divided, inputs no longer than its positions, no layers
    dropped at random, shared weights.
    """
    if not shape.trainable:
        raise BadInput("model: nothing is trained")
    text = base_model(shape.model).config.get_text_config()
    heads, width = getattr(text, "num_attention_heads", None), getattr(text, "hidden_size", None)
    of_keys = getattr(text, "num_key_value_heads", None)
    if heads and width and not getattr(text, "head_dim", None) and width % heads:
        found.problems.append(f"model: {heads} attention heads do not divide a width of {width}")
    if heads and of_keys and heads % of_keys:
        found.problems.append(f"model: {of_keys} heads of keys and values do not divide {heads} heads of queries")
    name, train = setup.recipe.model.name_or_path, setup.recipe.train
    refuse_long(longest_inputs(shape.model), name, train.max_length, train.max_target_length)
    refuse_layerdrop(shape.model, setup.stage, setup.world)
    if shared := _shared_names(shape.model):
        found.notes.append(f"model: {listed(shared, SHOWN)} (shared weights are trained, sharded and saved once)")


def _shared_names(model: nn.Module) -> list[str]:
    """`b is a`, for each parameter b that is an earlier parameter a."""
    first: dict[int, str] = {}
    shared = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (known := first.setdefault(id(parameter), name)) != name:
            shared.append(f"{name} is {known}")
    return shared


def _check_shards(setup: Setup, shape: ModelShape, found: DryRun) -> None:
    """The pieces of all ranks at every stage: each element of each parameter exactly once."""
    for stage in STAGES:
        shards = planned_shards(setup, shape, stage)
        ends, pieces = dict.fromkeys(shards.numels, 0), 0
        idle = 0
        ranks = 1 if stage == 0 else shards.ranks
        for rank in range(ranks):
            owned = shards.owned(rank)
            idle += not owned
            pieces += len(owned)
            for name, piece in owned.items():
                if piece.start != ends[name] or piece.offset + piece.numel > shards.flat_numels[piece.flat]:
                    raise BadInput(f"stage {stage}: rank {rank}'s piece of {name} does not follow the one before it")
                ends[name] = piece.stop
        if ends != shards.numels:
            raise BadInput(f"stage {stage}: the ranks' pieces do not cover every parameter")
        if stage != setup.stage:
            continue
        found.notes += _about_pieces(shards, pieces, idle)


def _about_pieces(shards: ShardMap, pieces: int, idle: int) -> Iterator[str]:
    numels, stage = shards.numels, shards.stage
    yield (
        f"shards: {len(numels)} trained parameters with {sum(numels.values())} elements on {shards.ranks} ranks; at "
        f"stages 0 to 3 the ranks' pieces hold every element once"
    )
    if stage == 0:
        return
    files = f"{QUANTITIES * pieces} spans of weights and moments in {shards.ranks} files"
    yield f"stage {stage}: {pieces} pieces and {shards.padding} elements of padding; a checkpoint has {files}"
    small = [name for name, numel in numels.items() if numel < shards.ranks]
    if stage == 3 and small:
        yield (
            f"stage 3: {len(small)} parameters have fewer elements than there are ranks ({small[0]} first), so that "
            "some ranks own nothing of them"
        )
    if idle:
        yield f"stage {stage}: {idle} ranks own no parameter at all, only padding"


def _check_methods(setup: Setup, shape: ModelShape, found: DryRun) -> None:
    """The methods' own arithmetic on the pieces."""
    rehearsal = Rehearsal(
        shape.model,
        setup.recipe.train,
        {name: each.shape for name, each in shape.trainable.items() if each.numel},
        planned_shards(setup, shape),
        lambda before: _try_out(shape, before),
    )
    result = compose(setup.recipe.method).rehearse(rehearsal)
    found.notes += result.notes
    found.problems += result.problems


def _try_out(shape: ModelShape, before: Callable[[Mapping[str, torch.Tensor]], None]) -> str | None:
    """See `Rehearsal.try_out`."""
    batches = trial_batches(shape.model, shape.objective)
    try:
        with evaluation_mode(shape.model), torch.no_grad(), _plain_attention(shape.model), grouped_products():
            for batch in batches:
                before(batch.token_masks)
                shape.model(**{name: tensor.to("meta") for name, tensor in batch.inputs.items()})
    except Exception as error:  # whatever a model does with numbers that are not there
        return " ".join(str(error).split())[:120] or type(error).__name__
    return None


@contextmanager
def _plain_attention(model: nn.Module) -> Iterator[None]:
    """Attention whose mask does not depend on numbers; the outputs have the same shapes."""
    configurations = {id(each): each for each in (base_model(model).config, base_model(model).config.get_text_config())}
    before = {key: each._attn_implementation for key, each in configurations.items()}
    for each in configurations.values():
        each._attn_implementation = "eager"
    try:
        yield
    finally:
        for key, each in configurations.items():
            each._attn_implementation = before[key]


def _check_buckets(setup: Setup, shape: ModelShape, found: DryRun) -> None:
    """Parameters that do not fit into a bucket are reduced by themselves."""
    if setup.stage == 0:
        return
    size = setup.bucket
    large = {name: each.numel for name, each in shape.trainable.items() if each.numel > size}
    if large:
        name, numel = max(large.items(), key=lambda item: item[1])
        found.notes.append(
            f"buckets: {len(large)} parameters have more elements than reduce_bucket_size ({size}) and are reduced by "
            f"themselves; the largest is {name} with {numel}"
        )


def _check_samples(setup: Setup, samples: Mapping[str, int] | None, found: DryRun) -> None:
    """Tasks with fewer samples than a global batch, and a warm-up that no task is long enough for."""
    train = setup.recipe.train
    batch = train.micro_batch_size * train.gradient_accumulation * setup.world
    if samples is None:
        found.notes.append(f"data: not here, so not checked; a global batch takes {batch} samples")
        return
    short = {name: count for name, count in samples.items() if count < batch}
    if short:
        name, count = min(short.items(), key=lambda item: item[1])
        found.problems.append(
            f"data: {len(short)} of {len(samples)} tasks have fewer samples than a global batch of {batch} "
            f"({train.micro_batch_size} x {train.gradient_accumulation} x {setup.world} ranks), {name} only {count}: "
            "ranks would compute on fillers; use fewer ranks or a smaller train.micro_batch_size"
        )
    epochs = {task.name: task.epochs or train.epochs for task in setup.recipe.stream.tasks}
    steps = [epochs.get(name, train.epochs) * -(-count // batch) for name, count in samples.items()]
    most = max((min(each, train.max_steps_per_task or each) for each in steps), default=0)
    rehearses = any(method.adds_samples or method.extra_steps(most) for method in setup.recipe.method)
    if train.warmup_steps > most and not rehearses:
        found.problems.append(
            f"train.warmup_steps: {train.warmup_steps}, but on {setup.world} ranks the longest task has {most} "
            "optimiser steps"
        )


def as_json(found: DryRun) -> dict[str, Any]:
    """The findings as JSON types."""
    return {"ranks": found.ranks, "works": found.works, "problems": found.problems, "notes": found.notes}
