"""What a recipe needs on a number of devices, what else would fit, and what would be fastest."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cl_dist.errors import BadInput
from cl_dist.planning.devices import EFFICIENCY, Device
from cl_dist.planning.memory import Memory, plan_memory
from cl_dist.planning.ranks import RankView
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.planning.step_time import Arithmetic, StepTime, predict_step, with_length
from cl_dist.planning.stream_time import StreamSize, StreamTime, predict_stream
from cl_dist.planning.trace import StepTrace, trace_key, trace_step
from cl_dist.planning.wire import Wire, on_the_link, plan_wire

GIB = 2**30
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Samples per rank and forward pass that are considered, beside the recipe's own."""
STAGES = (0, 1, 2, 3)
ALIKE = 1.03
"""Times that differ by less are taken for equal."""


@dataclass(frozen=True)
class Plan:
    """One way to run a recipe, and what it needs."""

    setup: Setup
    device: Device
    memory: Memory
    wire: Wire
    time: StepTime
    """Of a step on samples of the stream's mean length, or on the longest ones if the stream is not known."""
    stream: StreamTime | None = None
    """None: the stream is not known."""

    @property
    def device_bytes(self) -> int:
        """What a rank needs next to the model; on a CPU, all that it needs."""
        on_host = sum(self.memory.host.values()) if self.device.kind == "cpu" else 0
        return self.memory.device_peak + on_host

    @property
    def host_bytes(self) -> int:
        """What a rank needs in CPU memory besides."""
        return 0 if self.device.kind == "cpu" else sum(self.memory.host.values())

    @property
    def checkpoint_bytes(self) -> int:
        """Of one saved state, over all ranks."""
        return self.memory.checkpoint

    @cached_property
    def obstacles(self) -> tuple[str, ...]:
        """Why it does not fit, one sentence each."""
        ranks, found = self.setup.ranks_per_node, []
        if self.device.kind == "cpu":
            limit = int(self.device.memory * EFFICIENCY.usable_host) // ranks
        else:
            limit = int(self.device.memory * EFFICIENCY.usable_memory)
        if self.device_bytes > limit:
            found.append(
                f"a rank needs {gib(self.device_bytes)} GiB, but {self.device.title} gives it {gib(limit)} GiB"
            )
        limit = int(self.device.host_memory * EFFICIENCY.usable_host) // ranks
        if self.host_bytes > limit:
            found.append(f"a rank needs {gib(self.host_bytes)} GiB of CPU memory, but gets {gib(limit)} GiB of it")
        return tuple(found)

    @property
    def fits(self) -> bool:
        """Whether the memory is enough."""
        return not self.obstacles

    def wire_bytes(self) -> int:
        """Bytes that each rank sends in a step."""
        return on_the_link((*self.wire.step, *self.wire.methods_step), self.setup.world)

    def settings(self) -> dict[str, Any]:
        """What distinguishes it from other plans."""
        train, zero = self.setup.recipe.train, self.setup.recipe.zero
        return {
            "stage": zero.stage,
            "micro_batch_size": train.micro_batch_size,
            "gradient_accumulation": train.gradient_accumulation,
            "offload": zero.offload,
            "activation_checkpointing": train.activation_checkpointing,
        }


class Planner:
    """Plans a recipe in several set-ups, and does only once what they share.

    Args:
        setup: The recipe and its ranks.
        shape: Its model.
        device: What each rank trains on.
        stream: The size of the stream, or why it is not known.
        describe: The model of another recipe (`shape.describe_model`, given the configuration).
        published: Whether the model's shape is the published one, because the model is not here.
    """

    def __init__(
        self,
        setup: Setup,
        shape: ModelShape,
        device: Device,
        stream: StreamSize | str,
        describe: Callable[..., ModelShape],
        *,
        published: bool = False,
    ) -> None:
        self.setup, self.shape, self.device, self.stream = setup, shape, device, stream
        self.published = published
        self._describe = describe
        self._shapes = {setup.recipe.train.activation_checkpointing: shape}
        self._traces: dict[Hashable, StepTrace] = {}
        self._arithmetic: dict[int, Arithmetic] = {}

    def plan(self, setup: Setup, trace: StepTrace | None = None) -> Plan:
        """The plan of one set-up; `trace`: what its step allocates, if that is known approximately."""
        shape = self._shape_for(setup)
        trace = self._traced(setup) if trace is None else trace
        memory, wire = plan_memory(setup, shape, trace), plan_wire(setup, shape, trace)
        rank, arithmetic = RankView(setup, shape), self._arithmetic.setdefault(id(shape), Arithmetic(shape))

        def step_of(length: float, answer: float) -> StepTime:
            return predict_step(with_length(setup, shape, length, answer), self.device, wire, rank, arithmetic)

        if isinstance(self.stream, str):
            return Plan(setup, self.device, memory, wire, predict_step(setup, self.device, wire, rank, arithmetic))
        stream = predict_stream(setup, self.stream, step_of, self.device, arithmetic, memory)
        time = step_of(self.stream.length, self.stream.answer)
        return Plan(setup, self.device, memory, wire, time, stream)

    def alternatives(self) -> list[Plan]:
        """For every stage, offload and checkpointing: the best micro-batch. Those that fit come first, the recommended
        one before the others. The global batch stays the recipe's.
        """
        chosen = [
            preferred(plans)
            for stage in STAGES
            for offload in ((False, True) if stage else (False,))
            for checkpointing in (False, True)
            if (plans := list(self._micro_batches(stage, offload, checkpointing)))
        ]
        ordered = sorted(chosen, key=_rank)
        while ordered:
            best = preferred(ordered)
            if not best.fits:
                break
            # What is recommended is worked out exactly.
            exact = self.plan(best.setup)
            ordered[ordered.index(best)] = exact
            if exact.fits:
                return [exact, *(each for each in sorted(ordered, key=_rank) if each is not exact)]
        return sorted(ordered, key=_rank)

    def _micro_batches(self, stage: Any, offload: bool, checkpointing: bool) -> Iterator[Plan]:
        """Plans that differ in the micro-batch.

        Only the smallest and the largest micro-batch are traced. What lies between is estimated by a straight line: at
        every moment of a step memory is linear in the micro-batch, but for the logits of short answers.
        """
        train = self.setup.recipe.train
        per_rank = train.micro_batch_size * train.gradient_accumulation
        sizes = [size for size in sorted({*MICRO_BATCHES, train.micro_batch_size}) if per_rank % size == 0]
        if any(method.depends_on_split(per_rank > 1) for method in self.setup.recipe.method):
            sizes = [train.micro_batch_size]  # another split would train something else
        try:
            setups = [
                self.setup.varied(
                    stage=stage,
                    offload=offload,
                    checkpointing=checkpointing,
                    micro_batch=size,
                    accumulation=per_rank // size,
                )
                for size in sizes
            ]
            self._shape_for(setups[0])
        except (BadInput, ValueError):  # settings that exclude each other, or a model without checkpointing
            return
        small, large = self._traced(setups[0]), None
        if len(sizes) > 1:
            large = self._traced(setups[-1]) if stage < 3 else self._like_stage_2(setups, small)
        for size, setup in zip(sizes, setups, strict=True):
            trace = small if large is None else _between(small, large, (size - sizes[0]) / (sizes[-1] - sizes[0]))
            times = setup.recipe.train.gradient_accumulation * sizes[0] / per_rank
            trace = replace(trace, fetched=round(small.fetched * times), fetches=round(small.fetches * times))
            yield self.plan(setup, trace)

    def _like_stage_2(self, setups: Sequence[Setup], small: StepTrace) -> StepTrace:
        """The trace of the largest micro-batch at stage 3, which takes many times as long as at stage 2: activations
        grow by as much, and the gathered weights do not.
        """
        ends = [self._traced(each.varied(stage=2, offload=False)).peak for each in (setups[0], setups[-1])]
        grown = {kind: small.peak.get(kind, 0) + max(0, ends[1][kind] - ends[0].get(kind, 0)) for kind in ends[1]}
        return replace(small, peak={**small.peak, **grown})

    def _traced(self, setup: Setup) -> StepTrace:
        shape = self._shape_for(setup)
        key = trace_key(setup, shape)
        if key not in self._traces:
            self._traces[key] = trace_step(setup, shape)
        return self._traces[key]

    def _shape_for(self, setup: Setup) -> ModelShape:
        key = setup.recipe.train.activation_checkpointing
        if key not in self._shapes:
            self._shapes[key] = self._describe(setup.recipe, labels=setup.labels)
        return self._shapes[key]


def preferred(plans: Sequence[Plan]) -> Plan:
    """The fastest plan that fits. Among those that are as fast within what a prediction can tell: without offload, then
    the one that sends least, in the fewest micro-batches, and with least memory. If none fits, the one that needs least
    memory.
    """
    fitting = [plan for plan in plans if plan.fits]
    if not fitting:
        return min(plans, key=_rank)
    limit = ALIKE * min(plan.time.seconds for plan in fitting)
    alike = [plan for plan in fitting if plan.time.seconds <= limit]
    return min(alike, key=_simplicity)


def _simplicity(plan: Plan) -> tuple[bool, int, int, int]:
    recipe = plan.setup.recipe
    return recipe.zero.offload, plan.wire_bytes(), recipe.train.gradient_accumulation, plan.device_bytes


def _rank(plan: Plan) -> tuple[bool, float]:
    """Smaller is better: what fits, by its time; what does not, by how much memory it needs."""
    return not plan.fits, plan.time.seconds if plan.fits else float(plan.device_bytes)


def _between(small: StepTrace, large: StepTrace, place: float) -> StepTrace:
    kinds = {**small.peak, **large.peak}
    mixed = {kind: (1 - place) * small.peak.get(kind, 0) + place * large.peak.get(kind, 0) for kind in kinds}
    return replace(small, peak={kind: round(size) for kind, size in mixed.items()})


def gib(size: float) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / GIB:.2f}"
