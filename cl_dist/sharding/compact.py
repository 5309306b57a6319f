"""Sends only the kept rows of masked weights where DeepSpeed would send whole gradients and whole weights.

Which rows a step keeps is known on every rank before gradients are reduced. The others have a zero gradient everywhere,
so DeepSpeed's collectives get packed tensors instead: the kept rows of masked parameters, and all of the others
(`packing.py`). What comes back is put where DeepSpeed looks for it. Averaging, precision, streams and the choice of the
collective stay DeepSpeed's own; norms, clipping and every method see the same shards of the gradient as without it.
If dropped rows keep their weights too, every rank has them already when the others' new weights are gathered.

The seams in deepspeed 0.19.8 (private; `check.py` names them):

- stages 1 and 2: `average_tensor` cuts a bucket of gradients by owner and passes the slices to
  `allreduce_and_scatter`, `allreduce_no_retain` or, uncut, `gradient_reduction_w_predivide`;
- stage 0, and stage 1 with `BF16_Optimizer`: the engine passes gradients to its `allreduce_no_retain`;
- stage 3: `__avg_scatter_grads` passes a bucket to `reduce_scatter_coalesced`, looked up in its module. Owners get
  different numbers of kept rows, so there is one reduction for each owner: padding to the largest could send more;
- `step` of stages 1 and 2 gathers the updated weights by `all_gather_dp_groups`, looked up in its module. Each rank
  broadcasts the kept rows that it owns.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from cl_dist.kernels import RowLayout
from cl_dist.kernels.backend import sent
from cl_dist.sharding.layouts import FlatGroups, Layout, Partitioned, Replicated, WholeGradient
from cl_dist.sharding.maps import padded_piece
from cl_dist.sharding.packing import KeptRows, Packing
from cl_dist.sharding.view import ShardView, TorchState


class CompactExchange:
    """Lets only kept rows travel between `choose` and `clear`; otherwise DeepSpeed sends everything, as ever.

    On a single rank nothing travels, and nothing is installed.

    Args:
        shards: The engine's shards.
        layouts: How the rows of each masked parameter are stored, by name.
        gradients: The masked parameters whose dropped rows have a zero gradient on every rank once rows are chosen.
            If anything else adds to the gradient of these rows, that is dropped.
        weights: Whether the dropped rows of all masked parameters keep their weights bit for bit in every step.
    """

    def __init__(
        self,
        shards: ShardView,
        layouts: Mapping[str, RowLayout],
        gradients: Collection[str] = (),
        weights: bool = False,
    ) -> None:
        self._layouts, self._gradients = layouts, frozenset(gradients)
        self._kept: dict[str, KeptRows] = {}
        self._unsent = shards.unsent
        self._module = shards.layout.engine.module
        # A mask may come from elsewhere: that of a block which rests is known without a look at the model.
        self._device = next(self._module.parameters()).device
        self._names = {id(param): name for name, param in shards.params.items()}
        self._replaced: list[tuple[Any, str]] = []
        self._obstacle = _obstacle(shards.layout)
        self._alone = torch.distributed.get_world_size() == 1
        if self._gradients and self._obstacle is None and not self._alone:
            self._install(shards)
        self._gathers = isinstance(shards.layout, FlatGroups)
        if weights and self._gathers and not self._alone:
            _Gather(self, shards)

    def _install(self, shards: ShardView) -> None:
        layout = shards.layout
        if isinstance(layout, Partitioned):
            _Partitions(self, layout.zero)
        elif isinstance(layout, Replicated | WholeGradient):
            _WholeGradients(self, shards)
        else:
            _Buckets(self, layout.zero)

    def message(self, whole_gradients: str | None, whole_weights: str | None) -> str | None:
        """What travels between the ranks and why, for the log; None on a single rank.

        Args:
            whole_gradients: Why the recipe gives no `gradients`, if it does not.
            whole_weights: Why it gives no `weights`, if it does not.
        """
        if self._alone:
            return None
        none = None if self._gradients else "backward computes all rows of the masked weights"
        parts = [("gradients", whole_gradients or self._obstacle or none)]
        parts += [("updated weights", whole_weights)] if self._gathers else []
        return "; ".join(
            f"of masked {what}, only the kept rows travel between the ranks"
            if why is None
            else f"whole {what} travel between the ranks: {why}"
            for what, why in parts
        )

    def choose(self, keep: Mapping[str, torch.Tensor]) -> None:
        """Set which rows travel from now on; every rank must choose the same.

        Args:
            keep: `(rows,)` bool by parameter name, all on one device, with the rows of all experts one after the other.
                Parameters that have no layout travel whole.
        """
        keep = {name: mask for name, mask in keep.items() if name in self._layouts}
        if not self._replaced or not keep:
            return
        masks = list({id(mask): mask for mask in keep.values()}.values())  # a bias has its weight's
        ends = np.cumsum([mask.numel() for mask in masks])[:-1]
        rows = [np.flatnonzero(mask) for mask in np.split(torch.cat(masks).cpu().numpy(), ends)]
        index = sent(np.concatenate(rows), self._device).split([len(each) for each in rows])
        chosen = dict(zip(map(id, masks), zip(rows, index, strict=True), strict=True))
        self._kept = {name: KeptRows(name, self._layouts[name], *chosen[id(mask)]) for name, mask in keep.items()}

    def clear(self) -> None:
        """Let whole tensors travel from now on."""
        self._kept = {}
        self._unsent.clear()

    def remove(self) -> None:
        """Give DeepSpeed its own functions back."""
        for owner, name in self._replaced:
            del owner.__dict__[name]
        self._replaced.clear()

    def replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Shadow a method of one object by `function`, whose first argument is the original."""
        setattr(owner, name, partial(function, getattr(owner, name)))
        self._replaced.append((owner, name))

    @property
    def kept(self) -> Mapping[str, KeptRows]:
        """The chosen rows by parameter name; empty if whole tensors travel."""
        return self._kept

    @property
    def reducing(self) -> bool:
        """Whether a gradient that is reduced now is a step's own: those that methods measure are whole."""
        return bool(self._kept) and self._module.training

    def look_through(self, packing: Packing, flat: torch.Tensor) -> None:
        """Note which gradients are not finite on this rank, be it in rows that do not travel."""
        for name, gradient in packing.masked(flat):
            zero_or_nan = gradient.sum() * 0.0
            self._unsent[name] = zero_or_nan + self._unsent.get(name, 0.0)

    def of_gradient(self, param: torch.nn.Parameter) -> KeptRows | None:
        """The rows of a parameter's gradient that travel; None: all."""
        name = self._names[id(param)]
        return self._kept.get(name) if name in self._gradients else None


def _obstacle(layout: Layout) -> str | None:
    """Why gradients do not pass through the seams, or None."""
    if isinstance(layout.engine, TorchState):
        return "PyTorch itself reduces them (DistributedDataParallel, fully_shard)"
    kind = type(layout)
    stage = {FlatGroups: 2, Partitioned: 3}.get(kind, 0)
    names = ("contiguous_gradients", "reduce_scatter") if stage else ()
    return whole_gradients(stage, {name: getattr(layout.zero, name) for name in names})


def whole_gradients(stage: int, settings: Mapping[str, Any]) -> str | None:
    """The setting of DeepSpeed because of which gradients do not pass through the seams, or None.

    Args:
        stage: ZeRO stage; 0 also where every rank reduces whole gradients (`BF16_Optimizer`).
        settings: DeepSpeed's settings of `zero_optimization`.
    """
    contiguous = settings.get("contiguous_gradients", True)
    if stage in (1, 2) and not contiguous:
        return "zero.deepspeed: contiguous_gradients: false"
    if stage == 3 and contiguous and not settings.get("reduce_scatter", True):
        return "zero.deepspeed: reduce_scatter: false"
    return None


_SCATTER = "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads"


class _Buckets:
    """Stages 1 and 2: packs the slices of a bucket of gradients."""

    def __init__(self, exchange: CompactExchange, zero: Any) -> None:
        self._exchange, self._zero = exchange, zero
        self._packing: Packing | None = None
        """That of the bucket which is being reduced."""
        self._first: Any = 0
        """Where the bucket begins in its storage."""
        for function in (
            self.average_tensor, self.allreduce_and_scatter, self.allreduce_no_retain,
            self.gradient_reduction_w_predivide,
        ):  # fmt: skip
            exchange.replace(zero, function.__name__, function)

    def average_tensor(self, original: Any, tensor: torch.Tensor, communication_data_type: torch.dtype) -> None:
        """Reduce a bucket; the functions below run inside."""
        if self._exchange.reducing:
            bucket = self._zero.ipg_buckets[communication_data_type]
            params = [self._zero.bit16_groups[group][index] for group, index, _ in bucket.params]
            self._packing = Packing.in_a_row((each.numel(), self._exchange.of_gradient(each)) for each in params)
            self._first = tensor.storage_offset()
            self._exchange.look_through(self._packing, tensor)
        try:
            original(tensor, communication_data_type)
        finally:
            self._packing = None

    def allreduce_and_scatter(
        self, original: Any, bucket: list[Any], *args: Any, process_group: Any = None, **named: Any
    ) -> None:
        """Sum slices over all ranks; each is `(the ranks that use it, slice, where it is added up too)`."""
        if self._packing is None:
            return original(bucket, *args, process_group=process_group, **named)
        slices = [(ranks, self._slice(*where)) for ranks, *where in bucket]
        travelling = [(ranks, each.packed, each.output) for ranks, each in slices if each.packed.numel()]
        if travelling:
            original(travelling, *args, process_group=process_group, **named)
        own = torch.distributed.get_rank(process_group)
        for ranks, each in slices:
            if own in ranks:
                each.unpack()
        return None

    def allreduce_no_retain(
        self, original: Any, bucket: list[torch.Tensor], *args: Any, rank: int | None = None,
        process_group: Any = None, output_bucket: list[torch.Tensor | None] | None = None, **named: Any,
    ) -> None:  # fmt: skip
        """Sum slices for the one rank that owns them."""
        named |= {"rank": rank, "process_group": process_group}
        if self._packing is None:
            return original(bucket, *args, output_bucket=output_bucket, **named)
        slices = [self._slice(*each) for each in zip(bucket, output_bucket or [None] * len(bucket), strict=True)]
        travelling = [each for each in slices if each.packed.numel()]
        if travelling:
            outputs = [each.output for each in travelling]
            original([each.packed for each in travelling], *args, output_bucket=outputs, **named)
        if rank in (None, torch.distributed.get_rank(process_group)):
            for each in slices:
                each.unpack()
        return None

    def gradient_reduction_w_predivide(
        self, original: Any, tensor: torch.Tensor, communication_data_type: torch.dtype
    ) -> torch.Tensor:
        """Average a whole bucket over all ranks, in place; returns it in the precision of the sum."""
        if self._packing is None:
            return original(tensor, communication_data_type)
        reduced: torch.Tensor = original(self._packing.take(tensor, 0), communication_data_type)
        self._packing.put(reduced.to(tensor.dtype), tensor, 0, zero_dropped=True)
        if reduced.dtype == tensor.dtype:
            return tensor
        precise = torch.empty_like(tensor, dtype=reduced.dtype)
        self._packing.put(reduced, precise, 0, zero_dropped=True)
        return precise

    def _slice(self, piece: torch.Tensor, output: torch.Tensor | None) -> _Slice:
        assert self._packing is not None
        return _Slice(self._packing, piece, piece.storage_offset() - self._first, output)


class _Slice:
    """A slice of a bucket and its packed form.

    Args:
        packing: That of the bucket.
        piece: The slice.
        start: Its first element in the bucket.
        output: Where the owner adds up the sum too, in another precision: as long as the slice.
    """

    def __init__(self, packing: Packing, piece: torch.Tensor, start: int, output: torch.Tensor | None) -> None:
        self._packing, self._piece, self._start, self._whole_output = packing, piece, start, output
        self.packed = packing.take(piece, start)
        self.output = None if output is None else torch.zeros_like(self.packed, dtype=output.dtype)

    def unpack(self) -> None:
        """Put the sum where the slice was, and where it is added up."""
        self._packing.put(self.packed, self._piece, self._start, zero_dropped=True)
        if self._whole_output is not None and self.output is not None:
            self._packing.add(self.output, self._whole_output, self._start)


class _Gather:
    """Stages 1 and 2: of the updated weights, gathers kept rows."""

    def __init__(self, exchange: CompactExchange, shards: ShardView) -> None:
        self._exchange, self._params = exchange, shards.params
        zero = shards.layout.zero
        self._module: Any = import_module(type(zero).__module__)
        exchange.replace(zero, "step", self.step)

    def step(self, original: Any, *args: Any, **named: Any) -> None:
        """DeepSpeed's step, with another gather at its end. Other gathers find weights that did not come from a step,
        and stay whole.
        """
        whole = self._module.all_gather_dp_groups
        if self._exchange.kept:
            self._module.all_gather_dp_groups = self.all_gather_dp_groups
        try:
            original(*args, **named)
        finally:
            self._module.all_gather_dp_groups = whole

    def all_gather_dp_groups(
        self, groups_flat: Any, partitioned_param_groups: Any, dp_process_group: Any, **_: Any
    ) -> None:
        """Give all ranks the kept rows of what each of them owns, one flat tensor after the other."""
        kept = self._exchange.kept
        places = _Places((param, kept.get(name)) for name, param in self._params.items())
        for flat, pieces, group in zip(groups_flat, partitioned_param_groups, dp_process_group, strict=True):
            packing, own = places.inside(flat), torch.distributed.get_rank(group)
            start, arriving = 0, []
            for rank, piece in enumerate(pieces):
                size = packing.size(start, start + piece.numel())
                packed = packing.take(piece, start) if rank == own else piece.new_empty(size)
                if size:
                    source = torch.distributed.get_global_rank(group, rank)
                    work = torch.distributed.broadcast(packed, source, group, async_op=True)
                    arriving.append((rank, work, packed, piece, start))
                start += piece.numel()
            for rank, work, packed, piece, start in arriving:
                work.wait()
                if rank != own:
                    packing.put(packed, piece, start, zero_dropped=False)


class _WholeGradients:
    """Where every rank reduces all gradients whole: stage 0, and stage 1 with `BF16_Optimizer`."""

    def __init__(self, exchange: CompactExchange, shards: ShardView) -> None:
        self._exchange, self._shards = exchange, shards
        exchange.replace(shards.layout.engine, "allreduce_no_retain", self.allreduce_no_retain)

    def allreduce_no_retain(self, original: Any, bucket: list[torch.Tensor], *args: Any, **named: Any) -> None:
        """Average tensors over all ranks, in place. Each is the gradient of one parameter or of several in a row."""
        if not self._exchange.reducing:
            return original(bucket, *args, **named)
        params = self._shards.params
        held = {name: self._shards.gradient(name) for name in params}
        places = _Places((each.data, self._exchange.of_gradient(params[n])) for n, each in held.items() if each)
        flats = [tensor.view(-1) for tensor in bucket]
        packings = [places.inside(flat) for flat in flats]
        for packing, flat in zip(packings, flats, strict=True):
            self._exchange.look_through(packing, flat)
        packed = [packing.take(flat, 0) for packing, flat in zip(packings, flats, strict=True)]
        original([each for each in packed if each.numel()], *args, **named)
        for packing, each, flat in zip(packings, packed, flats, strict=True):
            packing.put(each, flat, 0, zero_dropped=True)
        return None


class _Partitions:
    """Stage 3: packs the gradients of a bucket by owner."""

    def __init__(self, exchange: CompactExchange, zero: Any) -> None:
        self._exchange = exchange
        self._module: Any = import_module(type(zero).__module__)
        exchange.replace(zero, _SCATTER, self.scatter)

    def scatter(self, original: Any, params: list[Any], communication_data_type: torch.dtype) -> Any:
        """DeepSpeed's function, with another reduce-scatter inside."""
        whole = self._module.reduce_scatter_coalesced
        if self._exchange.reducing:
            packings = [Packing.in_a_row([(each.ds_numel, self._exchange.of_gradient(each))]) for each in params]
            self._module.reduce_scatter_coalesced = partial(self.reduce_scatter_coalesced, packings)
        try:
            return original(params, communication_data_type)
        finally:
            self._module.reduce_scatter_coalesced = whole

    def reduce_scatter_coalesced(
        self, packings: list[Packing], tensors: list[torch.Tensor], group: Any = None
    ) -> list[torch.Tensor]:
        """Average gradients, and return this rank's piece of each, without the padding at a parameter's end."""
        world, own = torch.distributed.get_world_size(group), torch.distributed.get_rank(group)
        flats = [tensor.view(-1) for tensor in tensors]
        for packing, flat in zip(packings, flats, strict=True):
            self._exchange.look_through(packing, flat)
        # The ends of the ranks' pieces, in each gradient and in its packed form.
        ends = [[min(rank * padded_piece(len(flat), world), len(flat)) for rank in range(world + 1)] for flat in flats]
        sizes = [
            [packing.size(*between) for between in pairwise(stops)]
            for packing, stops in zip(packings, ends, strict=True)
        ]
        packed = [
            packing.take(flat, 0).split(parts) for packing, flat, parts in zip(packings, flats, sizes, strict=True)
        ]
        pieces = [torch.cat(of_rank).div_(world) for of_rank in zip(*packed, strict=True)]
        works = [
            torch.distributed.reduce(piece, torch.distributed.get_global_rank(group, rank), group=group, async_op=True)
            for rank, piece in enumerate(pieces)
            if piece.numel()
        ]
        for work in works:
            work.wait()
        found = []
        arrived = pieces[own].split([parts[own] for parts in sizes])
        for packing, flat, stops, part in zip(packings, flats, ends, arrived, strict=True):
            piece = flat.new_empty(stops[own + 1] - stops[own])
            packing.put(part, piece, stops[own], zero_dropped=True)
            found.append(piece)
        return found


class _Places:
    """Where tensors lie in the flat ones that they are views of.

    Args:
        tensors: Each with its kept rows; None: all of it travels.
    """

    def __init__(self, tensors: Iterable[tuple[torch.Tensor, KeptRows | None]]) -> None:
        every = [(tensor.data_ptr(), tensor.numel(), kept) for tensor, kept in tensors if tensor.numel()]
        self._places = sorted(every, key=lambda place: place[0])
        self._starts = [start for start, *_ in self._places]

    def inside(self, flat: torch.Tensor) -> Packing:
        """How a flat tensor is packed: what lies in it travels, and if nothing does, all of it."""
        first, size = flat.data_ptr(), flat.element_size()
        inside = self._places[bisect_left(self._starts, first) : bisect_left(self._starts, first + flat.nbytes)]
        found = [((start - first) // size, numel, kept) for start, numel, kept in inside]
        return Packing(found or [(0, flat.numel(), None)])
