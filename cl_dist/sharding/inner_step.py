"""Hooks around the inner optimiser's step: freeze rows or elements through it, or see the gradients that it applied.

DeepSpeed's own step reduces, clips, runs the inner AdamW and copies the masters into the model. Only between the last
two do clipped gradients, updated masters and moments all exist. ZeRO runs the inner optimiser once per parameter group
(or sub-group), so each hook handles only what is being stepped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from cl_dist.kernels import AdamWSettings, AdamWState, RowLayout, RowPiece, adamw_rows_
from cl_dist.sharding.layouts import Address, Shard, local_part
from cl_dist.sharding.view import ShardView

Take = Callable[[Mapping[str, Shard]], None]
"""Receives clipped gradients by parameter name, aligned with this rank's masters; zero where a parameter got none."""
Keep = Callable[[Mapping[str, Shard]], Mapping[str, torch.Tensor]]
"""Chooses the elements that an inner step may update, given the first moments that it has just advanced, by parameter
name: `(numel,)` bool for each, aligned with this rank's masters. A parameter that is left out is updated as a whole."""


class RowFreezer:
    """Keeps chosen rows of weights and moments bit for bit through every optimiser step.

    A zero gradient does not stop AdamW: momentum and decoupled weight decay still move the row. So where rows are
    frozen, `kernels.adamw_rows_` takes the place of torch's fused AdamW, with the same bits for the other rows, and
    leaves frozen ones alone. Hooks around the inner step run as ever. Any other optimiser steps all rows, and the
    frozen ones are put back right after it, before DeepSpeed copies the masters into the model.

    Args:
        shards: The engine's shards.
        layouts: How the rows of each parameter are stored, by name; by default they run along its first dimension.
    """

    def __init__(self, shards: ShardView, layouts: Mapping[str, RowLayout] | None = None) -> None:
        self._shards, self._layouts = shards, layouts or {}
        self._keep: Mapping[str, torch.Tensor] = {}
        self._saved: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        """For each piece: a live view of its rows, which of them are frozen, and their values before the step."""
        self._pieces: dict[int, list[tuple[str, Address]]] = {}
        """What lies in each tensor that is stepped, in its order."""
        for name, param in shards.params.items():
            at = shards.layout.address(param)
            if at is not None:
                self._pieces.setdefault(id(at.flat), []).append((name, at))
        self._handles: list[Any] = []
        for optimizer in shards.layout.optimizers:
            if steps_rows(optimizer):
                self._handles.append(_Replacement(optimizer, self._step_kept))
            else:
                self._handles.append(optimizer.register_step_pre_hook(self._save))
                self._handles.append(optimizer.register_step_post_hook(self._restore))

    def freeze(self, keep: Mapping[str, torch.Tensor]) -> None:
        """Set which rows may move from now on; an empty mapping freezes nothing.

        Args:
            keep: `(rows,)` bool by parameter name, with the rows of all experts one after the other.
        """
        self._keep = keep

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _step_kept(self, flat: torch.Tensor, state: dict[str, torch.Tensor], group: dict[str, Any]) -> bool:
        """Step a tensor, unless no row of it is frozen."""
        pieces = self._row_pieces(flat)
        if pieces is None:
            return False
        assert flat.grad is not None
        state["step"] += 1
        held = (local_part(each) for each in (flat.detach(), flat.grad, state["exp_avg"], state["exp_avg_sq"]))
        param, grad, exp_avg, exp_avg_sq = held
        tensors = AdamWState(param.view(-1), grad.reshape(-1), exp_avg.view(-1), exp_avg_sq.view(-1))
        beta1, beta2 = group["betas"]
        settings = AdamWSettings(group["lr"], beta1, beta2, group["eps"], group["weight_decay"])
        adamw_rows_(tensors, local_part(state["step"]), pieces, settings)
        return True

    def _row_pieces(self, flat: torch.Tensor) -> list[RowPiece] | None:
        """Divide a tensor into pieces with a mask and the stretches between them; None if none has a mask."""
        masked = [(name, at) for name, at in self._pieces.get(id(flat), ()) if name in self._keep]
        if not masked:
            return None
        self._bring_masks(flat.device)
        pieces, end = [], 0
        for name, at in sorted(masked, key=lambda piece: piece[1].offset):
            if at.offset > end:
                pieces.append(RowPiece(end, at.offset - end))
            pieces.append(RowPiece(at.offset, at.numel, at.start, self._layout(name), self._keep[name]))
            end = at.offset + at.numel
        if end < (numel := local_part(flat).numel()):
            pieces.append(RowPiece(end, numel - end))
        return pieces

    def _layout(self, name: str) -> RowLayout:
        shape = self._shards.shape(name)
        return self._layouts.get(name, RowLayout(1, shape[0], shape.numel() // shape[0]))

    def _bring_masks(self, device: torch.device) -> None:
        """Copy all masks at once to where the masters are, which may be offloaded."""
        if any(keep.device != device for keep in self._keep.values()):
            together = torch.cat(list(self._keep.values())).to(device)
            parts = together.split([len(keep) for keep in self._keep.values()])
            self._keep = dict(zip(self._keep, parts, strict=True))

    def _save(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for name, at in _stepped(self._shards, optimizer):
            if name not in self._keep:
                continue
            self._bring_masks(at.flat.device)
            for shard in (at.piece_of(at.flat.detach()), *self._shards.moments(name).values()):
                for segment in self._layout(name).segments(shard.start, shard.data.numel()):
                    rows, dropped = segment.view(shard.data), ~self._keep[name].narrow(0, segment.row, segment.rows)
                    self._saved.append((rows, dropped, rows[dropped].clone()))

    def _restore(self, *_: Any) -> None:
        for rows, dropped, before in self._saved:
            rows[dropped] = before
        self._saved.clear()


def steps_rows(optimizer: torch.optim.Optimizer) -> bool:
    """Whether `kernels.adamw_rows_` computes what this optimiser does: torch's fused AdamW, as every run has it."""
    return (
        type(optimizer) is torch.optim.AdamW
        and hasattr(optimizer, "_init_group")
        and all(
            group["fused"] and not (group["amsgrad"] or group["maximize"] or isinstance(group["lr"], torch.Tensor))
            for group in optimizer.param_groups
        )
    )


class _Replacement:
    """Lets `step` step tensors in the place of torch's AdamW, which steps those that it declines.

    Torch asks `_init_group` which tensors to step, and creates missing moments there. It is shadowed here, rather than
    `Optimizer.step`, so that all hooks around the step see it as ever.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        step: Callable[[torch.Tensor, dict[str, torch.Tensor], dict[str, Any]], bool],
    ) -> None:
        self._optimizer = optimizer
        collect: Callable[..., bool] = optimizer._init_group  # type: ignore[attr-defined]

        def collected(group: dict[str, Any], params: list[torch.Tensor], *lists: list[torch.Tensor]) -> bool:
            is_complex = collect(group, params, *lists)
            left = [not step(param, optimizer.state[param], group) for param in params]
            for tensors in (params, *lists):
                if tensors:  # one list is of AMSGrad, and empty
                    tensors[:] = [tensor for tensor, stays in zip(tensors, left, strict=True) if stays]
            return is_complex

        self._collected = collected
        optimizer._init_group = collected  # type: ignore[attr-defined]

    def remove(self) -> None:
        """Give the step back to torch; as with torch's own handles, a second call does nothing."""
        if vars(self._optimizer).get("_init_group") is self._collected:
            del self._optimizer._init_group  # type: ignore[attr-defined]


class ElementFilter:
    """Takes back what an inner step did to the elements that it may not update.

    `keep` is asked right after every inner step, when the moments have advanced and DeepSpeed has not yet copied the
    masters into the model. All ranks step alike, so `keep` may communicate.

    Args:
        shards: The engine's shards.
        names: Parameters of which elements are chosen.
        keep: Chooses.
        frozen: Whether the other elements keep weight and moments bit for bit. Otherwise they get no update, but their
            weights decay and their moments advance.
    """

    def __init__(self, shards: ShardView, names: Sequence[str], keep: Keep, frozen: bool) -> None:
        self._shards, self._names, self._keep, self._frozen = shards, frozenset(names), keep, frozen
        self._before: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        """For each piece of what is stepped, a live view of it and its values before the step."""
        inner = shards.layout.inner
        self._handles = [inner.register_step_pre_hook(self._save), inner.register_step_post_hook(self._take_back)]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _save(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = {id(flat): group for group in optimizer.param_groups for flat in group["params"]}
        for name, at in _stepped(self._shards, optimizer):
            if name not in self._names:
                continue
            pieces = [at.piece_of(at.flat.detach()).data]
            if self._frozen:
                pieces += [moment.data for moment in self._shards.moments(name).values()]
            self._before[name] = [(piece, piece.clone()) for piece in pieces]
            if not self._frozen:
                group = groups[id(at.flat)]
                self._before[name][0][1].mul_(1 - group["lr"] * group["weight_decay"])

    def _take_back(self, *_: Any) -> None:
        keep = self._keep({name: self._shards.moments(name)["exp_avg"] for name in self._before})
        for name, pieces in self._before.items():
            for live, before in pieces if name in keep else ():
                torch.where(keep[name].to(live.device), live, before, out=live)
        self._before.clear()


class SteppedGradients:
    """Shows `take` the clipped gradients right after each inner step, beside the masters that they have updated.

    Once DeepSpeed's own step returns, the gradients are gone, and the clipping factor is known only inside it. A hook
    sees both without a copy.

    Args:
        shards: The engine's shards.
        take: Gets the gradients of what was just stepped. It may be called several times a step, but never twice with
            the same parameter.
    """

    def __init__(self, shards: ShardView, take: Take) -> None:
        self._shards, self._take = shards, take
        self._handles = [each.register_step_post_hook(self._after_step) for each in shards.layout.optimizers]

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        gradients = {}
        for name, at in _stepped(self._shards, optimizer):
            gradient = torch.zeros_like(at.flat) if at.flat.grad is None else at.flat.grad
            gradients[name] = at.piece_of(gradient.detach())
        self._take(gradients)


def _stepped(shards: ShardView, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Address]]:
    """Yield the parameters of which this rank owns a piece that `optimizer` is stepping, and where the piece lies."""
    stepped = {id(flat) for group in optimizer.param_groups for flat in group["params"]}
    for name, param in shards.params.items():
        at = shards.layout.address(param)
        if at is not None and id(at.flat) in stepped:
            yield name, at
