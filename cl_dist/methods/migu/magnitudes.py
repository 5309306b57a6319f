"""Output magnitudes of all tracked layers, added up while forward passes run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from cl_dist.errors import ClDistError
from cl_dist.kernels import row_magnitude
from cl_dist.methods.migu.token_axes import Call, Trial, calls_of, counted
from cl_dist.models.experts import Routed
from cl_dist.models.layer_kinds import Tap, TrackedLayer

Plan = Mapping[str, tuple[Call, ...]]
"""By layer, what its calls in a forward pass are."""


class MagnitudeSums:
    """Hooks on the tracked layers that add their row magnitudes to one flat vector.

    Args:
        model: The model that the layers belong to.
        layers: By name, the tracked layers.
        per_token: L1-normalise every token's output before the sum (`kernels.row_magnitude`).
        count_padding: Count every token; otherwise those that `token_masks` marks.
        plan: What the layers' calls are; None: every output counts, until `learnt` knows better.
        mask_bias: For the taps.
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
        """Rows that are ranked together, in the order of `layers`: a layer's, or each expert's."""
        device = next(model.parameters()).device
        self.flat = torch.zeros(sum(self.sizes), dtype=torch.float64, device=device)
        """Sums of this rank since `clear`, all layers one after the other. A micro-batch's magnitudes are float32;
        their sum in double precision does not depend on the order, hence not on how micro-batches lie on ranks."""
        self.tokens = torch.zeros(len(self.sizes), dtype=torch.float64, device=device)
        """Of each expert the tokens that counted since `clear`; of other layers zero."""
        self.calls = dict.fromkeys(layers, 0)
        """How often each layer was measured since `clear`."""
        self.counting = False
        """Whether forward passes of training count."""
        self.awaited: set[str] | None = {layer.name for layer in layers.values() if not layer.kind.tapped}
        """Layers whose forward has not run in training yet; None: nobody asks."""
        self.plan = plan
        self._model, self._per_token, self._count_padding = model, per_token, count_padding
        self._masks: Mapping[str, torch.Tensor] = {}
        self._place = dict.fromkeys(layers, 0)
        self._trials: list[tuple[Mapping[str, torch.Tensor], dict[str, list[torch.Size | None]]]] = []
        self._learning = False
        totals = [layer.layout.total for layer in layers.values()]
        self.by_layer = dict(zip(layers, self.flat.split(totals), strict=True))
        """Views of `flat` by layer name."""
        groups = [layer.layout.matrices for layer in layers.values()]
        self._tokens = dict(zip(layers, self.tokens.split(groups), strict=True))
        self.taps: dict[str, Tap] = {}
        """By name, the modules whose outputs show in a tap, such as experts."""
        self._handles: list[RemovableHandle] = []
        self._watch(mask_bias)

    def clear(self) -> None:
        """Start from zero."""
        self.flat.zero_()
        self.tokens.zero_()
        self.calls = dict.fromkeys(self.layers, 0)

    def begin(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """A forward pass of training comes next, over these real tokens: bool `(batch, length)` by kind."""
        self._masks = token_masks
        self._place = dict.fromkeys(self.layers, 0)
        for tap in self.taps.values():
            tap.active = self.counting

    def learn(self, token_masks: Mapping[str, torch.Tensor]) -> None:
        """The forward pass that comes next is a trial: note what every layer does with these tokens."""
        self._learning = True
        self._trials.append((token_masks, {name: [] for name in self.layers}))

    def learnt(self) -> dict[str, str]:
        """The trials are over: plan how outputs are counted, and return why not by layer where they cannot be."""
        self._learning = False
        found = {name: calls_of([Trial(shapes[name], masks) for masks, shapes in self._trials]) for name in self.layers}
        self._trials.clear()
        self.plan = {name: calls for name, calls in found.items() if not isinstance(calls, str)}
        return {name: reason for name, reason in found.items() if isinstance(reason, str)}

    def remove(self) -> None:
        """Take the hooks off again."""
        for handle in self._handles:
            handle.remove()
        for tap in self.taps.values():
            tap.remove()

    @property
    def learning(self) -> bool:
        """Whether the forward pass under way is a trial."""
        return self._learning

    def _watch(self, mask_bias: bool) -> None:
        """Let the layers' outputs come here, in hooks or through one tap for each module."""
        tapped: dict[str, list[TrackedLayer]] = {}
        for layer in self.layers.values():
            if layer.kind.tapped:
                tapped.setdefault(layer.name.rpartition(".")[0], []).append(layer)
            else:
                self._handles.append(layer.kind.hook(layer, self))
        for name, layers in tapped.items():
            self.taps[name] = layers[0].kind.tap(name, layers, self, mask_bias)

    def wants(self, layer: TrackedLayer, module: nn.Module, leading: torch.Size | None) -> bool:
        """Whether a call's outputs are to be recorded; a trial's are not, but their shape is noted."""
        # A forward pass inside backward recomputes activations: those tokens were counted the first time.
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
            magnitude = row_magnitude(output, which, per_token=self._per_token)
            self.by_layer[layer.name].add_(magnitude)

    def record_routed(self, layer: TrackedLayer, routed: Routed) -> None:
        """Add to each expert's sums those of the tokens that were routed to it."""
        which = self._counted(layer, routed.leading)
        if which is False:
            return
        self.calls[layer.name] += 1
        counts = None if which is None else which.expand(routed.leading).reshape(-1)[routed.token]
        matrices = layer.layout.matrices
        experts = routed.experts if counts is None else routed.experts[counts]
        self._tokens[layer.name].add_(torch.bincount(experts, minlength=matrices))
        start = 0
        for sums, count in zip(self.by_layer[layer.name].view(matrices, -1), routed.per_expert, strict=True):
            if count:
                here = slice(start, start + count)
                mask = None if counts is None else counts[here]
                sums.add_(row_magnitude(routed.output[here], mask, per_token=self._per_token))
            start += count

    def _counted(self, layer: TrackedLayer, leading: torch.Size) -> torch.Tensor | Literal[False] | None:
        """Bool per output: those that count; None: all of them; False: the call is not one over tokens at all."""
        if self.plan is None:
            return None
        calls, place = self.plan[layer.name], self._place[layer.name]
        if place >= len(calls):
            raise ClDistError(f"layer {layer.name} runs more often in a forward pass than it did before training")
        self._place[layer.name] += 1
        if calls[place].form == "table":
            # A layer that runs over tokens too is measured over those alone.
            return None if all(call.form == "table" for call in calls) else False
        which = counted(calls[place], leading, self._masks, layer.name)
        return None if self._count_padding else which
