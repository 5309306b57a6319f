"""Two tiny batches that run through a model before training starts.

No two of their sizes are equal: number of samples, padded and real input tokens, padded and real target tokens, nor the
products of the number of samples with the others. So the shape of a layer's output leaves only one way to read it
(`methods/shared/token_axes.py`). The tokens are made up, so an engine can be tried out without data.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from cl_dist.config.objectives import ObjectiveName
from cl_dist.config.plugins import own_fault
from cl_dist.engine.collective_errors import is_broken_gpu, is_collective
from cl_dist.engine.device import device
from cl_dist.engine.memory_errors import where_exhausted
from cl_dist.errors import BadInput, ClDistError
from cl_dist.models.structure import base_model
from cl_dist.sharding import ShardView
from cl_dist.tasks.collate import Batch, collate
from cl_dist.tasks.objectives import OBJECTIVES
from cl_dist.tasks.types import Encoded

LENGTHS = (((7, 5, 6), (4, 2, 3)), ((5, 3), (3, 2)))
"""For each batch, the input tokens and the target tokens of its samples."""
_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""DeepSpeed's counters, which a trial must not move."""


def trial_batches(model: nn.Module, objective: ObjectiveName) -> list[Batch]:
    """Two batches on the CPU, the same on every rank."""
    config = base_model(model).config
    text = config.get_text_config()
    draw = random.Random(0)

    # Any token will do but padding and the end token, which models treat differently.
    vocabulary = int(getattr(text, "vocab_size", None) or 2)
    start = getattr(config, "decoder_start_token_id", None)
    pad = getattr(text, "pad_token_id", None)
    pad_id = pad if isinstance(pad, int) and 0 <= pad < vocabulary else 0
    end = getattr(text, "eos_token_id", None)
    reserved = {pad_id, *(end if isinstance(end, list) else [end])}
    ids = [number for number in range(min(vocabulary, 512)) if number not in reserved] or [0]

    def sample(length: int, targets: int) -> Encoded:
        tokens = [draw.choice(ids) for _ in range(length)]
        answer = [draw.choice(ids) for _ in range(targets)]
        return Encoded(0, tokens, OBJECTIVES[objective].made_up_labels(tokens, answer))

    return [
        collate(
            [sample(*pair) for pair in zip(*lengths, strict=True)],
            objective,
            pad_id,
            pad_id if start is None else start,
        )
        for lengths in LENGTHS
    ]


@contextmanager
def counters_kept(engine: Any) -> Iterator[None]:
    """Restore the counters of a DeepSpeed engine afterwards: it counts a trial as a step, which never happened."""
    counters = {name: getattr(engine, name) for name in _COUNTERS if hasattr(engine, name)}
    try:
        yield
    finally:
        for name, value in counters.items():
            setattr(engine, name, value)


def idle_parameters(shards: ShardView) -> frozenset[str]:
    """Names of the trainable parameters whose reduced gradient is zero on all ranks (collective)."""
    found = [shards.gradient(name) for name in shards.names]
    flags = [shard is not None and bool(shard.data.count_nonzero()) for shard in found]
    reached = torch.tensor(flags, dtype=torch.float32, device=device())
    torch.distributed.all_reduce(reached)
    return frozenset(name for name, flag in zip(shards.names, reached.tolist(), strict=True) if not flag)


@contextmanager
def failures_as_bad_input() -> Iterator[None]:
    """Raise BadInput in place of an internal error: what fails on a tiny batch of made-up tokens is the model's fault.

    Errors of collectives and of broken GPUs, out-of-memory errors and the project's own errors pass through.
    """
    try:
        yield
    except ClDistError:
        raise
    except Exception as error:
        if own_fault(error) is not None or where_exhausted(error) is not None:
            raise
        if isinstance(error, RuntimeError) and (is_collective(error) or is_broken_gpu(error)):
            raise
        reason = " ".join(str(error).split())[:300]
        raise BadInput(
            f"model.name_or_path: one forward and backward pass on a tiny batch, before training, failed with "
            f"{type(error).__name__}: {reason}; this model cannot be trained as the recipe says"
        ) from error
