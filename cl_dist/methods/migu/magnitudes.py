"""Output magnitudes of all tracked layers, summed during forward passes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cl_dist.errors import ClDistError
from cl_dist.kernels import MagnitudeTotal
from cl_dist.methods.shared.token_axes import Call, Trial, calls_of, counted
from cl_dist.models.experts import Routed
from cl_dist.models.layer_kinds import Tap, TrackedLayer
from cl_dist.sharding import Shard

Plan = Mapping[str, tuple[Call, ...]]
"""The calls of each layer in a forward pass, by layer name."""


class MagnitudeSums:
    """Hooks on the tracked layers that add row magnitudes to one flat vector.

    Args:
        model: The model that the layers belong to.
        layers: The tracked layers by name.
        per_token: L1-normalise each token's output before summing (`kernels.row_magnitude`).
        count_padding: Count all tokens, rather than only those that `token_masks` marks.
        plan: The layers' calls; None: all outputs count until `learnt` has made a plan.
        mask_bias: Passed to the taps.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, TrackedLayer],
        per_token: bool = True,
        count_padding: bool = False,
        plan: Plan | None = None,
        mask_bias: bool = True,
    ) -> None:
        self.layers = layers
        self.sizes = [size for layer in layers.values() for size in layer.sizes]
        """Numbers of rows that are ranked together, in the order of `layers`: one per layer, or per expert."""
        device = next(model.parameters()).device
        self._total = MagnitudeTotal(torch.zeros(sum(self.sizes), dtype=torch.float64, device=device))
        self.tokens = torch.zeros(len(self.sizes), dtype=torch.float64, device=device)
        """Tokens counted for each expert since `clear`; zero for other layers."""
        self.calls = dict.fromkeys(layers, 0)
        """Number of measurements of each layer since `clear`."""
        self.counting = False
        """Whether training forward passes are measured."""
        self.awaited: set[str] | None = {layer.name for layer in layers.values() if not layer.kind.tapped}
        """Layers whose forward has not run in training yet; None: no longer recorded."""
        self.plan = plan
        self._model, self._per_token, self._count_padding = model, per_token, count_padding
        self._masks: Mapping[str, torch.Tensor] = {}
        self._place = dict.fromkeys(layers, 0)
        self._trials: list[tuple[Mapping[str, torch.Tensor], dict[str, list[torch.Size | None]]]] = []
        self._learning = False
        totals = [layer.layout.total for layer in layers.values()]
        self._start = dict(zip(layers, itertools.accumulate([0, *totals]), strict=False))
        """Where a layer begins in `flat`, by name."""
        groups = [layer.layout.matrices for layer in layers.values()]
        self._tokens = dict(zip(layers, self.tokens.split(groups), strict=True))
        self.taps: dict[str, Tap] = {}
        """Taps of modules such as experts, whose outputs no hook sees, by module name."""
        self._handles: list[RemovableHandle] = []
        self._watch(mask_bias)

    @property
    def flat(self) -> torch.Tensor:
        """This rank's sums since `clear`, all layers one after the other, `(sum of sizes,)` float64.

        A micro-batch's magnitudes are float32. Their sum in double precision does not depend on the order, and so not
        on which rank has which micro-batch.
        """
        return self._total.fold()

    @property
    def by_layer(self) -> dict[str, torch.Tensor]:
        """Views of `flat` by layer name."""
        totals = [layer.layout.total for layer in self.layers.values()]
        return dict(zip(self.layers, self.flat.split(totals), strict=True))

    def clear(self) -> None:
        """Reset all sums to zero."""
        self._total.forget()
        self._total.total.zero_()
        self.tokens.zero_()
        self.calls = dict.fromkeys(self.layers, 0)

    def remembered(self) -> torch.Tensor:
        """A copy of `flat`, to go back to with `recall`."""
        return self.flat.clone()

    def recall(self, sums: torch.Tensor) -> None:
        """Replace `flat`, `(sum of sizes,)` float64."""
        self._total.forget()
        self._total.total.copy_(sums)

    def tensors(self, replicated: bool) -> dict[str, Shard]:
        """The layers that this rank saves, by weight: live views of `flat`, which together hold each layer once.

        Args:
            replicated: Whether rank 0 writes the whole saved state (ZeRO stage 0).
        """
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        return {
            self.layers[name].weight: Shard(0, sums)
            for number, (name, sums) in enumerate(self.by_layer.items())
            if replicated or number % world == rank
        }

    def before_save(self, replicated: bool) -> None:
        """Put the sums over all ranks where `tensors` saves them, and zeros elsewhere (collective).

        The sums over all ranks stay what they were, to the last bit: they are exact in double precision.
        """
        torch.distributed.all_reduce(self.flat)
        self.tensors_loaded(replicated)

    def tensors_loaded(self, replicated: bool) -> None:
        """`tensors` has what was saved, all of it on every rank if `replicated`; nothing may count twice."""
        own = self.tensors(replicated) if not replicated or torch.distributed.get_rank() == 0 else {}
        for name, sums in self.by_layer.items():
            if self.layers[name].weight not in own:
                sums.zero_()
        self.calls = dict.fromkeys(self.layers, 1)  # the steps before have measured every layer

    def begin(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """A training forward pass starts now. `token_masks` marks its real tokens: bool `(batch, length)` by kind."""
        self._masks = token_masks
        self._place = dict.fromkeys(self.layers, 0)
        for tap in self.taps.values():
            tap.active = self.counting

    def learn(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """A trial forward pass starts now: record what each layer does with these tokens."""
        self._learning = True
        self._trials.append((token_masks, {name: [] for name in self.layers}))

    def learnt(self) -> dict[str, str]:
        """The trials are over: plan how to count outputs. Returns the layers that cannot be counted, with reasons."""
        self._learning = False
        found = {name: calls_of([Trial(shapes[name], masks) for masks, shapes in self._trials]) for name in self.layers}
        self._trials.clear()
        self.plan = {name: calls for name, calls in found.items() if not isinstance(calls, str)}
        return {name: reason for name, reason in found.items() if isinstance(reason, str)}

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        for tap in self.taps.values():
            tap.remove()

    @property
    def learning(self) -> bool:
        """Whether the current forward pass is a trial."""
        return self._learning

    def _watch(self, mask_bias: bool) -> None:
        """Hook the layers, or tap the modules that need it, one tap per module."""
        tapped: dict[str, list[TrackedLayer]] = {}
        for layer in self.layers.values():
            if layer.kind.tapped:
                tapped.setdefault(layer.name.rpartition(".")[0], []).append(layer)
            else:
                self._handles.append(layer.kind.hook(layer, self))
        for name, layers in tapped.items():
            self.taps[name] = layers[0].kind.tap(name, layers, self, mask_bias)

    def wants(self, layer: TrackedLayer, module: nn.Module, leading: torch.Size | None) -> bool:
        """Whether to record a call's outputs. In a trial, only their shape is recorded."""
        # A forward pass inside backward recomputes activations; its tokens have been counted already.
        if torch._C._current_graph_task_id() != -1:
            return False
        if self._learning:
            self._trials[-1][1][layer.name].append(leading)
            return False
        if self.awaited and module.training:
            self.awaited.discard(layer.name)
        return self.counting and module.training

    def record(self, layer: TrackedLayer, output: torch.Tensor) -> None:
        """Add the magnitudes of a call's outputs."""
        which = self._counted(layer, output.shape[:-1])
        if which is not False:
            self.calls[layer.name] += 1
            self._total.add(output, which, self._start[layer.name], per_token=self._per_token)

    def record_routed(self, layer: TrackedLayer, routed: Routed) -> None:
        """Add the magnitudes of each expert's tokens to its sums."""
        which = self._counted(layer, routed.leading)
        if which is False:
            return
        self.calls[layer.name] += 1
        counts = None if which is None else which.expand(routed.leading).reshape(-1)[routed.token]
        matrices = layer.layout.matrices
        experts = routed.experts if counts is None else routed.experts[counts]
        self._tokens[layer.name].add_(torch.bincount(experts, minlength=matrices))
        start, row = 0, self._start[layer.name]
        for count in routed.per_expert:
            if count:
                here = slice(start, start + count)
                mask = None if counts is None else counts[here]
                self._total.add(routed.output[here], mask, row, per_token=self._per_token)
            start, row = start + count, row + layer.layout.rows

    def _counted(self, layer: TrackedLayer, leading: torch.Size) -> torch.Tensor | Literal[False] | None:
        """Mask of the outputs to count; None: all of them; False: the call does not run over tokens."""
        if self.plan is None:
            return None
        calls, place = self.plan[layer.name], self._place[layer.name]
        if place >= len(calls):
            raise ClDistError(f"layer {layer.name} runs more often in a forward pass than it did before training")
        self._place[layer.name] += 1
        if calls[place].form == "table":
            # A layer that also runs over tokens is measured on those alone.
            return None if all(call.form == "table" for call in calls) else False
        which = counted(calls[place], leading, self._masks, layer.name)
        return None if self._count_padding else which
