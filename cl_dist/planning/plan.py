"""What a recipe needs on a number of devices, what else would fit, and what would be fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cl_dist.errors import BadInput
from cl_dist.methods.cost import Collective
from cl_dist.planning.devices import EFFICIENCY, Device
from cl_dist.planning.dry_run import planned_shards
from cl_dist.planning.memory import Memory, method_cost, plan_memory
from cl_dist.planning.setup import Setup
from cl_dist.planning.shape import ModelShape
from cl_dist.planning.step_time import Arithmetic, StepTime, predict_step, with_length
from cl_dist.planning.stream_time import StreamSize, StreamTime, predict_stream
from cl_dist.planning.wire import Wire, plan_wire

GIB = 2**30
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
"""Samples per rank and forward pass that are considered, beside the recipe's own."""
STAGES = (0, 1, 2, 3)


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
        return sum(self.memory.disk.values())

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
        world = self.setup.world
        return sum(each.on_the_link(world) for each in (*self.wire.step, *self.wire.methods_step))

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
    """

    def __init__(
        self,
        setup: Setup,
        shape: ModelShape,
        device: Device,
        stream: StreamSize | str,
        describe: Callable[..., ModelShape],
    ) -> None:
        self.setup, self.shape, self.device, self.stream = setup, shape, device, stream
        self._describe = describe
        self._shapes = {setup.recipe.train.activation_checkpointing: shape}

    def plan(self, setup: Setup) -> Plan:
        """The plan of one set-up."""
        shape = self._shape_for(setup)
        return self._plan(setup, shape, plan_memory(setup, shape), plan_wire(setup, shape))

    def _plan(self, setup: Setup, shape: ModelShape, memory: Memory, wire: Wire) -> Plan:
        cost = method_cost(setup, shape)
        arithmetic = Arithmetic(shape)
        owned = sum(planned_shards(setup, shape).flat_numels)

        def step_of(length: float, answer: float) -> StepTime:
            return predict_step(with_length(setup, length, answer), shape, self.device, wire, cost, owned, arithmetic)

        if isinstance(self.stream, str):
            return Plan(
                setup, self.device, memory, wire, predict_step(setup, shape, self.device, wire, cost, owned, arithmetic)
            )
        saved = sum(memory.disk.values())
        time = step_of(self.stream.length, self.stream.answer)
        stream = predict_stream(setup, self.stream, step_of, self.device, arithmetic, saved)
        return Plan(setup, self.device, memory, wire, time, stream)

    def alternatives(self) -> list[Plan]:
        """For every stage, offload and checkpointing: the fastest micro-batch that fits, else the smallest one. Those
        that fit come first, and the fastest of them before the others. The global batch stays the recipe's.
        """
        chosen = [
            min(plans, key=_preference)
            for stage in STAGES
            for offload in ((False, True) if stage else (False,))
            for checkpointing in (False, True)
            if (plans := list(self._micro_batches(stage, offload, checkpointing)))
        ]
        return sorted(chosen, key=_preference)

    def _micro_batches(self, stage: Any, offload: bool, checkpointing: bool) -> Iterator[Plan]:
        """Plans that differ in the micro-batch.

        Memory and communication are worked out for the smallest and the largest one. Memory is linear in the
        micro-batch at every moment of a step, so its peak is convex, and what lies between is at most what a straight
        line says. Communication is linear in the number of micro-batches.
        """
        train = self.setup.recipe.train
        per_rank = train.micro_batch_size * train.gradient_accumulation
        sizes = [size for size in sorted({*MICRO_BATCHES, train.micro_batch_size}) if per_rank % size == 0]
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
            shape = self._shape_for(setups[0])
        except (BadInput, ValueError):  # settings that exclude each other, or a model without checkpointing
            return
        few, often = plan_memory(setups[0], shape), plan_wire(setups[0], shape)
        many, seldom = few, often
        if len(setups) > 1:
            many, seldom = plan_memory(setups[-1], shape), plan_wire(setups[-1], shape)
        for size, setup in zip(sizes, setups, strict=True):
            memory = _between(few, many, _place(size, sizes[0], sizes[-1]))
            steps = setup.recipe.train.gradient_accumulation
            wire = _wire_between(often, seldom, _place(steps, per_rank // sizes[0], per_rank // sizes[-1]))
            yield self._plan(setup, shape, memory, wire)

    def _shape_for(self, setup: Setup) -> ModelShape:
        key = setup.recipe.train.activation_checkpointing
        if key not in self._shapes:
            self._shapes[key] = self._describe(setup.recipe, labels=setup.labels)
        return self._shapes[key]


def _preference(plan: Plan) -> tuple[bool, float, int, int]:
    """Smaller is better: what fits, then what is faster; what does not fit, by how little memory it needs."""
    size = plan.setup.recipe.train.micro_batch_size
    if plan.fits:
        return False, plan.time.seconds, plan.device_bytes, size
    return True, float(plan.device_bytes), plan.host_bytes, size


def _place(value: int, first: int, last: int) -> float:
    """Where a value lies between two others: 0 at the first, 1 at the last."""
    return 0.0 if first == last else (value - first) / (last - first)


def _between(low: Memory, high: Memory, place: float) -> Memory:
    def mixed(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
        names = dict.fromkeys((*one, *other))
        return {name: round((1 - place) * one.get(name, 0) + place * other.get(name, 0)) for name in names}

    return Memory(mixed(low.device, high.device), mixed(low.host, high.host), mixed(low.disk, high.disk))


def _wire_between(often: Wire, seldom: Wire, place: float) -> Wire:
    def mixed(one: tuple[Collective, ...], other: tuple[Collective, ...]) -> tuple[Collective, ...]:
        if len(one) != len(other):
            return one if place < 0.5 else other
        return tuple(
            replace(
                a,
                bytes=round((1 - place) * a.bytes + place * b.bytes),
                calls=round((1 - place) * a.calls + place * b.calls),
            )
            for a, b in zip(one, other, strict=True)
        )

    return Wire(
        mixed(often.step, seldom.step),
        mixed(often.methods_step, seldom.methods_step),
        mixed(often.methods_task, seldom.methods_task),
    )


def gib(size: float) -> str:
    """Bytes as GiB with two decimals."""
    return f"{size / GIB:.2f}"
