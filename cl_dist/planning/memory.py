"""Bytes that one rank needs, by component, and the moment of a step at which they are most.

What is held throughout (weights, masters, moments, states) follows Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054,
section 3 and 5), with what DeepSpeed 0.19.8 really allocates; each formula names its place in DeepSpeed's code. What a
step allocates in addition comes from `planning/trace.py`.

On a GPU this is what PyTorch's allocator has to hand out. The CUDA context (about half a gigabyte), NCCL's buffers and
what the allocator loses to fragmentation come on top. On a CPU, Python and the libraries take about 0.6 GB more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cl_dist.config.objectives import FACTS
from cl_dist.planning.ranks import FLOAT32, RankView
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.planning.trace import StepTrace, trace_step
from cl_dist.tasks.samples import SELECTION_BYTES, table_bytes

NORM_BYTES = 8
"""DeepSpeed converts each gradient to float64 for its norm (`get_norm_dtype`)."""
REPLICATED_BUCKET = 500_000_000
"""Stage 0 reduces gradients in buckets of this many elements (`MEMORY_OPT_ALLREDUCE_SIZE` in engine.py)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of the rank that needs most."""

    device: Mapping[str, int]
    """Next to the model, by component, at the peak of a step. On a CPU this is host memory like `host`."""
    host: Mapping[str, int]
    """In CPU memory, by component."""
    disk: Mapping[str, int]
    """Of all ranks together, by component."""
    held: Mapping[str, int]
    """Device memory that is held between steps, by component."""
    phase: str
    """When in a step the peak is."""
    gradients: int
    """Bytes of the reduced gradient on this rank, wherever it is, when the optimiser steps."""

    @property
    def device_peak(self) -> int:
        """Bytes of device memory at the peak of a step."""
        return sum(self.device.values())

    @property
    def host_total(self) -> int:
        """Bytes of CPU memory, without what is on a CPU device."""
        return sum(self.host.values())

    @property
    def checkpoint(self) -> int:
        """Bytes of one saved state, of all ranks together."""
        return self.disk["saved state"]


def plan_memory(setup: Setup, shape: ModelShape, trace: StepTrace | None = None) -> Memory:
    """The memory of the rank that needs most (the first; `RankView`).

    `trace` is that of `trace_step` for the same arguments; None: run it.
    """
    rank, trace = RankView(setup, shape), trace or trace_step(setup, shape)
    held, host = Counter[str](), Counter[str]()
    _weights(rank, held, host)
    _optimiser(rank, host if setup.recipe.zero.offload else held)
    _gradient_buffers(rank, held, host)
    held.update(rank.methods.device)
    host.update(rank.methods.host)
    if setup.samples is not None:
        host["tokenised data"] += _tokenised(setup, shape, setup.samples)
    phases = dict(_phases(rank, trace))
    phase = max(phases, key=lambda name: sum(phases[name].values()))
    device = held + phases[phase]
    return Memory(
        device=_positive(device),
        host=_positive(host),
        disk=_disk(rank),
        held=_positive(held),
        phase=phase,
        gradients=rank.step_gradients or held["gradients"] or host["gradients"],
    )


def _tokenised(setup: Setup, shape: ModelShape, samples: int) -> int:
    """The samples of the whole stream, as long as the recipe allows (`tasks/samples.py`).

    The ranks of a node map one file; here each has its share of it. The order of the samples is every rank's own.
    """
    facts = FACTS[shape.objective]
    apart = setup.recipe.train.max_target_length if facts.answer_apart else 1 if facts.needs_labels else 0
    table = table_bytes(samples, samples * setup.tokens, samples * apart, vocabulary=shape.vocabulary)
    return -(-table // setup.ranks_per_node) + samples * SELECTION_BYTES


def _positive(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size > 0}


def _weights(rank: RankView, held: Counter[str], host: Counter[str]) -> None:
    """Weights in the model's precision.

    Stages 1 and 2 copy the trainable ones into flat tensors, padded (`flatten_dense_tensors_aligned`). Stage 3 cuts
    every parameter into equal pieces, padded (`partition_parameters.py`), and keeps small ones whole in addition
    (`mark_persistent_parameters`).
    """
    setup, shape, size = rank.setup, rank.shape, rank.setup.itemsize
    held["weights"] += shape.buffer_bytes
    if setup.stage == 0:
        held["weights"] += shape.nbytes
    elif setup.stage < 3:
        frozen = sum(each.nbytes for each in shape.parameters if not each.trainable)
        held["weights"] += frozen + rank.owned * setup.world * size
    else:
        pieces = sum(-(-each.numel // setup.world) * each.itemsize for each in shape.parameters)
        (host if setup.weights_on_host else held)["weights"] += pieces
        held["weights"] += rank.persistent * size


def _optimiser(rank: RankView, where: Counter[str]) -> None:
    """Float32 masters and AdamW's two moments, of what this rank owns.

    In float32, the weights themselves are the masters at stage 0. The other stages clone their part: stage 3 compares
    a device with its name (`_create_fp32_partitions`), so its own attempt to share them never succeeds.
    """
    shared = rank.setup.stage == 0 and rank.setup.itemsize == FLOAT32
    where["master"] += 0 if shared else FLOAT32 * rank.owned
    where["moments"] += 2 * FLOAT32 * rank.owned


def _gradient_buffers(rank: RankView, held: Counter[str], host: Counter[str]) -> None:
    """What holds gradients from step to step.

    Stage 3 has a flat buffer of its pieces and a bucket (`_setup_for_real_optimizer`). With offload, the masters have
    float32 gradients in addition (`initialize_optimizer_states`), and stages 1 and 2 stage the largest parameter on
    both sides and a low-precision copy of the masters on the CPU.
    """
    setup, size = rank.setup, rank.setup.itemsize
    offload = setup.recipe.zero.offload
    if setup.stage == 3:
        buffer = rank.owned * setup.gradient_itemsize
        if offload:
            host["communication buffers"] += buffer
        else:
            held["gradients"] += buffer
        held["communication buffers"] += setup.bucket * setup.communication_itemsize
    if setup.whole_float32_gradients:
        held["gradients"] += FLOAT32 * rank.owned * setup.world
    if offload:
        host["gradients"] += FLOAT32 * rank.owned
    if offload and setup.stage < 3:
        largest = max(each.numel for each in rank.shape.trainable.values())
        host["communication buffers"] += (largest + rank.owned) * size
        held["communication buffers"] += largest * size
        if setup.recipe.train.gradient_accumulation > 1:  # `async_accumulate_grad_in_cpu_via_gpu`
            host["communication buffers"] += rank.touched * size


def _phases(rank: RankView, trace: StepTrace) -> Iterator[tuple[str, Counter[str]]]:
    """What each phase of a step needs in addition to what is held, at its own peak."""
    setup, size = rank.setup, rank.setup.itemsize
    gradient = Counter({"gradients": rank.step_gradients})
    yield "forward and backward", Counter(trace.peak)
    yield "reduction", _reduction(rank)
    largest = max((each.numel for each in rank.map.owned(rank.rank).values()), default=0)
    yield "norm", gradient + Counter({"optimiser's copies": NORM_BYTES * largest})
    flat = max(rank.map.flat_numels, default=0)
    if setup.stage == 0:
        copies = 0 if size == FLOAT32 else FLOAT32 * rank.trained  # `FP16_UnfusedOptimizer.step`
    elif setup.recipe.zero.offload or setup.whole_float32_gradients:
        copies = 0
    else:
        # `flatten` copies, and another copy is float32. Group by group, or sub-group by sub-group at stage 3.
        copies = flat * setup.gradient_itemsize + (FLOAT32 * flat if setup.gradient_itemsize != FLOAT32 else 0)
    stepping = {} if setup.recipe.zero.offload else rank.methods.stepping
    yield "optimiser", gradient + Counter({"optimiser's copies": copies}) + Counter(stepping)


def _reduction(rank: RankView) -> Counter[str]:
    """Stages 0 and 1 reduce when backward is over, while all gradients are still there.

    Stage 0 flattens them bucket by bucket (`allreduce_bucket` in engine.py). Stage 1 copies them into a bucket, which
    is flattened again; what this rank owns is then copied out. Stage 2 and 3 reduce during backward (in the trace).
    """
    setup, size = rank.setup, rank.setup.itemsize
    whole = rank.trained * size
    if setup.stage == 0:
        return Counter({"gradients": whole, "communication buffers": min(rank.trained, REPLICATED_BUCKET) * size})
    if setup.whole_float32_gradients:
        flat = max(rank.map.flat_numels, default=0) * setup.world
        return Counter({"communication buffers": flat * setup.communication_itemsize})
    if setup.stage == 1:
        bucket = setup.bucket * size
        return Counter({"gradients": whole + rank.step_gradients, "communication buffers": bucket})
    return Counter()


def _disk(rank: RankView) -> dict[str, int]:
    """Saved states and models.

    A state has float32 masters and moments of every trained element once, and the methods' tensors
    (`state/snapshot.py`). While it is written, the states that it will replace are still there. Every task exports its
    model, or its adapters, in the model's precision.
    """
    setup, shape = rank.setup, rank.shape
    recipe = setup.recipe
    copies = 1 if setup.stage == 0 else setup.world
    state = 3 * FLOAT32 * rank.trained + rank.methods.saved * copies
    exported = sum(each.nbytes for each in shape.parameters if each.trainable or recipe.model.lora is None)
    return {
        "saved state": state,
        "saved states at most": state * (recipe.checkpoint.keep + 1),
        "model of each task": exported,
    }
