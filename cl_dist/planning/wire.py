"""Bytes that the ranks exchange, by collective.

Rajbhandari et al. 2020 (arXiv 1910.02054, section 7) count 2 n elements sent per step for n parameters at stages 0 to
2, and 3 n at stage 3. DeepSpeed 0.19.8 sends more at stages 1 and 2: by default it all-reduces a bucket of gradients
instead of reducing each piece to its owner (`use_multi_rank_bucket_allreduce`), and gathers the weights afterwards.
`Collective` has the convention in which bytes are counted.

What a method masks before the ranks exchange it travels without its dropped rows (`sharding/compact.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from cl_dist.methods.cost import Collective
from cl_dist.planning.ranks import RankView
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.planning.trace import StepTrace, trace_step
from cl_dist.sharding.compact import whole_gradients

GATHERED_WEIGHTS = "weights for forward and backward"
UPDATED_WEIGHTS = "updated weights"


@dataclass(frozen=True)
class Wire:
    """Collectives of one rank. None on a single rank. Messages of a few numbers (norms, flags) are left out."""

    step: tuple[Collective, ...]
    """Of every optimiser step, without the methods'."""
    methods_step: tuple[Collective, ...]
    """What the methods add to every step."""
    methods_task: tuple[Collective, ...]
    """What the methods add at the end of every task."""

    @property
    def step_bytes(self) -> int:
        """Bytes of a step's collectives, with the methods'."""
        return sum(each.bytes for each in (*self.step, *self.methods_step))


def on_the_link(collectives: Iterable[Collective], world: int) -> int:
    """Bytes that each rank sends, with rings."""
    return sum(each.on_the_link(world) for each in collectives)


def plan_wire(setup: Setup, shape: ModelShape, trace: StepTrace | None = None) -> Wire:
    """The collectives of a step; `trace` is that of `trace_step` for the same arguments, needed at stage 3 only."""
    if setup.world == 1:
        return Wire((), (), ())
    rank = RankView(setup, shape)
    trace = trace or trace_step(setup, shape) if setup.stage == 3 else None
    methods = rank.methods
    stage = 0 if setup.whole_float32_gradients else setup.stage
    unsent = 0 if whole_gradients(stage, rank.zero) else methods.unsent_gradients
    own = tuple(_collectives(rank, trace, unsent, methods.unsent_weights))
    measured = tuple(_collectives(rank, trace, 0, 0))  # gradients that a method measures are whole
    return Wire(own, measured * methods.passes + methods.step, methods.task)


def _collectives(
    rank: RankView, trace: StepTrace | None, unsent_gradients: int, unsent_weights: int
) -> Iterator[Collective]:
    if trace is None:
        return _flat(rank, unsent_gradients, unsent_weights)
    return _partitioned(rank, trace, unsent_gradients)


def _flat(rank: RankView, unsent_gradients: int, unsent_weights: int) -> Iterator[Collective]:
    """Stages 0 to 2. Stage 2 reduces after every micro-batch, the others once per step."""
    setup = rank.setup
    times = setup.recipe.train.gradient_accumulation if setup.stage == 2 else 1
    padded = setup.whole_float32_gradients and not unsent_gradients
    elements = rank.owned * setup.world if padded else rank.trained - unsent_gradients
    to_owner = setup.stage > 0 and not rank.zero.get("use_multi_rank_bucket_allreduce", True)
    reduces = to_owner and rank.zero.get("reduce_scatter", True) and not setup.whole_float32_gradients
    size = elements * setup.communication_itemsize * times
    yield Collective("reduce" if reduces else "all_reduce", size, "gradients", times)
    groups = len(rank.map.flat_numels)
    if setup.stage > 0 and unsent_weights:
        size = (rank.trained - unsent_weights) * setup.itemsize
        yield Collective("broadcast", size, UPDATED_WEIGHTS, groups * setup.world)
    elif setup.stage > 0:
        # `all_gather_dp_groups`: each group's flat tensor, padded
        yield Collective("all_gather", rank.owned * setup.world * setup.itemsize, UPDATED_WEIGHTS, groups)


def _partitioned(rank: RankView, trace: StepTrace, unsent_gradients: int) -> Iterator[Collective]:
    """Stage 3: weights are gathered in forward and backward, small ones after the step; each gradient is scattered."""
    setup = rank.setup
    kind = "all_reduce" if rank.zero.get("stage3_use_all_reduce_for_fetch_params") else "all_gather"
    yield Collective(kind, trace.fetched, GATHERED_WEIGHTS, trace.fetches)  # type: ignore[arg-type]
    times = setup.recipe.train.gradient_accumulation
    if unsent_gradients:  # one for each owner
        size = (rank.trained - unsent_gradients) * setup.communication_itemsize * times
        yield Collective("reduce", size, "gradients", times * setup.world)
    elif rank.zero.get("reduce_scatter", True):
        size = rank.owned * setup.world * setup.communication_itemsize * times  # padded, `reduce_scatter_coalesced`
        yield Collective("reduce_scatter", size, "gradients", times)
    else:
        yield Collective("all_reduce", rank.trained * setup.communication_itemsize * times, "gradients", times)
    if rank.persistent:
        yield Collective("all_gather", rank.persistent * setup.itemsize, "small weights after the step")
