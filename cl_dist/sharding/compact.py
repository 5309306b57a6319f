"""Sends only the kept rows of masked weights where DeepSpeed would send whole gradients.

Which rows a step keeps is known on every rank before gradients are reduced. The others have a zero gradient everywhere,
so DeepSpeed's collectives get packed tensors instead: the kept rows of masked parameters, and all of the others
(`packing.py`). What comes back is put where DeepSpeed looks for it. Averaging, precision, streams and the choice of the
collective stay DeepSpeed's own; norms, clipping and every method see the same shards of the gradient as without it.

The seams in deepspeed 0.19.8 (private; `check.py` names them):

- stages 1 and 2: `average_tensor` cuts a bucket of gradients by owner and passes the slices to
  `allreduce_and_scatter`, `allreduce_no_retain` or, uncut, `gradient_reduction_w_predivide`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from cl_dist.kernels import RowLayout
from cl_dist.kernels.backend import sent
from cl_dist.sharding.layouts import FlatGroups, Layout, WholeGradient
from cl_dist.sharding.packing import KeptRows, Packing
from cl_dist.sharding.view import ShardView


class CompactExchange:
    """Lets only kept rows travel between `choose` and `clear`; otherwise DeepSpeed sends everything, as ever.

    On a single rank nothing travels, and nothing is installed.

    Args:
        shards: The engine's shards.
        layouts: How the rows of each masked parameter are stored, by name.
        gradients: The masked parameters whose dropped rows have a zero gradient on every rank once rows are chosen.
            If anything else adds to the gradient of these rows, that is dropped.
    """

    def __init__(self, shards: ShardView, layouts: Mapping[str, RowLayout], gradients: Collection[str] = ()) -> None:
        self._layouts, self._gradients = layouts, frozenset(gradients)
        self._kept: dict[str, KeptRows] = {}
        self._module = shards.layout.engine.module
        self._names = {id(param): name for name, param in shards.params.items()}
        self._replaced: list[tuple[Any, str]] = []
        self._obstacle = _obstacle(shards.layout)
        self._alone = torch.distributed.get_world_size() == 1
        if self._gradients and self._obstacle is None and not self._alone:
            _Buckets(self, shards.layout.zero)

    def message(self, method: str, whole_gradients: str | None) -> str | None:
        """One line for the log about what travels, and why; None on a single rank.

        Args:
            method: Who chooses the rows.
            whole_gradients: Why the recipe gives no `gradients`, if it does not.
        """
        why = whole_gradients or self._obstacle
        if self._alone:
            return None
        if why:
            return f"{method}: whole gradients travel between the ranks: {why}"
        return f"{method}: of masked gradients, only the kept rows travel between the ranks (method.compact: auto)"

    def choose(self, keep: Mapping[str, torch.Tensor]) -> None:
        """Set which rows travel from now on; every rank must choose the same.

        Args:
            keep: `(rows,)` bool by parameter name, with the rows of all experts one after the other.
        """
        if not self._replaced or not keep:
            return
        masks = list({id(mask): mask for mask in keep.values()}.values())  # a bias has its weight's
        ends = np.cumsum([mask.numel() for mask in masks])[:-1]
        rows = [np.flatnonzero(mask) for mask in np.split(torch.cat(masks).cpu().numpy(), ends)]
        index = sent(np.concatenate(rows), masks[0].device).split([len(each) for each in rows])
        chosen = dict(zip(map(id, masks), zip(rows, index, strict=True), strict=True))
        self._kept = {name: KeptRows(self._layouts[name], *chosen[id(mask)]) for name, mask in keep.items()}

    def clear(self) -> None:
        """Let whole tensors travel from now on."""
        self._kept = {}

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
    def reducing(self) -> bool:
        """Whether a gradient that is reduced now is a step's own: those that methods measure are whole."""
        return bool(self._kept) and self._module.training

    def of_gradient(self, param: torch.nn.Parameter) -> KeptRows | None:
        """The rows of a parameter's gradient that travel; None: all."""
        name = self._names[id(param)]
        return self._kept.get(name) if name in self._gradients else None


def _obstacle(layout: Layout) -> str | None:
    """The setting of DeepSpeed because of which gradients do not pass through the seams."""
    if not isinstance(layout, FlatGroups) or isinstance(layout, WholeGradient):
        return "they are packed at ZeRO stages 1 and 2 only"
    if not layout.zero.contiguous_gradients:
        return "zero.deepspeed has contiguous_gradients: false"
    return None


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
