"""The kinds of linear layers that MIGU can track, one class each.

A tracked layer is a linear map whose output is visible in every forward pass and whose gradient can be masked by output
rows. A kind recognises its modules, locates their weights, rows and biases, captures their outputs, and knows how the
backward pass can skip rows. To add a kind, write a class here and add it to `KINDS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from cl_dist.kernels import RowLayout
from cl_dist.models.experts import ExpertsTap, Routed
from cl_dist.models.row_gradients import ChosenRows, row_skipping_conv1d, row_skipping_linear
from cl_dist.models.structure import whole_shape

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""Parameters of a module of experts; their biases are called `<name>_bias`."""

LIKE_LINEAR = frozenset(("FalconLinear",))
"""Subclasses of `nn.Linear` whose forward computes the same as its own."""

Modules = Mapping[str, nn.Module]
"""The modules of a model by name."""


@dataclass(frozen=True)
class TrackedLayer:
    """One layer whose output rows are measured and masked."""

    name: str
    """The module's name; for experts, the parameter's name."""
    module: nn.Module
    """The module whose forward computes the output."""
    kind: LayerKind
    weight: str
    """Name of the weight in `model.named_parameters()`."""
    bias: str | None
    """Name of the trained bias, `(rows,)` or `(experts, rows)`; None without one."""
    layout: RowLayout
    """Where the rows are in the flattened weight, which holds one matrix, or one per expert."""

    @property
    def sizes(self) -> list[int]:
        """Numbers of rows that are ranked together: one number, or one per expert."""
        return [self.layout.rows] * self.layout.matrices

    @property
    def bias_layout(self) -> RowLayout:
        """Where the rows are in the flattened bias."""
        return self.layout._replace(length=1, columns=False)


class Sink(Protocol):
    """Receives the outputs of tracked layers."""

    @property
    def learning(self) -> bool:
        """Whether the current forward pass is a trial."""

    def wants(self, layer: TrackedLayer, module: nn.Module, leading: torch.Size | None) -> bool:
        """Whether to record a call whose outputs have this leading shape (None: the output is not a tensor).

        Has to be asked once per call of the layer, whatever the answer: a trial notes the shapes.
        """

    def record(self, layer: TrackedLayer, output: torch.Tensor) -> None:
        """Record the output of one call, `(..., rows)`."""

    def record_routed(self, layer: TrackedLayer, routed: Routed) -> None:
        """Record the output of one call of a layer with one matrix per expert."""


class Tap(Protocol):
    """A replacement for a module's forward that exposes intermediate outputs and can skip rows in backward."""

    active: bool
    """Whether forward passes of training are observed."""
    skips: bool
    """Whether backward computes only the chosen rows."""
    rows: dict[str, list[torch.Tensor]] | None
    """Chosen rows of each matrix, `(kept,)` int64, by the last part of the layer name; None: not chosen yet."""

    def remove(self) -> None:
        """Restore the module."""


class LayerKind:
    """One kind of layer. The defaults suit a module with a matrix `weight`, an optional `bias` and one output."""

    name: ClassVar[str]
    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Module classes of this kind."""
    columns: ClassVar[bool] = False
    """Whether the weight is stored as `(in, out)`, so that its rows are columns."""
    tapped: ClassVar[bool] = False
    """Whether outputs are captured by a tap inside the module instead of a hook on it."""
    routed: ClassVar[bool] = False
    """Whether a layer has one matrix per expert, each applied to the tokens routed to it."""

    def recognises(self, name: str, module: nn.Module, modules: Modules) -> bool:
        """Whether the module holds layers of this kind."""
        return isinstance(module, self.types)

    def layers(self, name: str, module: nn.Module) -> Iterator[TrackedLayer]:
        """Yield the layers in a recognised module, trained or not."""
        weight = module.weight
        if isinstance(weight, nn.Parameter):
            first, second = whole_shape(weight)
            rows, length = (second, first) if self.columns else (first, second)
            bias = f"{name}.bias" if isinstance(getattr(module, "bias", None), nn.Parameter) else None
            layout = RowLayout(1, rows, length, columns=self.columns)
            yield TrackedLayer(name, module, self, f"{name}.weight", bias, layout)

    def hook(self, layer: TrackedLayer, sink: Sink) -> RemovableHandle:
        """Send the layer's outputs to `sink` (kinds without a tap)."""

        def record(module: nn.Module, _: Any, output: torch.Tensor) -> None:
            leading = output.shape[:-1] if isinstance(output, torch.Tensor) else None
            if sink.wants(layer, module, leading):
                sink.record(layer, output)

        return layer.module.register_forward_hook(record)

    def tap(self, name: str, layers: Sequence[TrackedLayer], sink: Sink, mask_bias: bool) -> Tap:
        """Send the outputs of all tracked layers of one module to `sink` (kinds with a tap).

        Args:
            name: The module's name.
            layers: Its tracked layers.
            sink: Receives their outputs.
            mask_bias: Mask the gradients of the biases along with the weights'.
        """
        raise NotImplementedError

    def skips(self, module: nn.Module) -> bool:
        """Whether this module's backward can be made to compute only chosen rows of the weight gradient."""
        return False

    def skipping_forward(self, module: nn.Module, chosen: ChosenRows) -> Callable[..., torch.Tensor]:
        """A forward whose backward skips rows, called like the module's own (kinds that skip rows and have no tap)."""
        raise NotImplementedError

    def takes_adapter(self, module: nn.Module) -> bool | None:
        """Whether a LoRA adapter works on the module; None: peft does not know it as a layer of this kind."""
        return None


class Linear(LayerKind):
    """`nn.Linear`, weight `(out, in)`."""

    name = "linear"
    types = (nn.Linear,)

    def skips(self, module: nn.Module) -> bool:
        """Not in subclasses that override the forward."""
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    def skipping_forward(self, module: nn.Module, chosen: ChosenRows) -> Callable[..., torch.Tensor]:
        """See `row_skipping_linear`."""

        def forward(input: torch.Tensor) -> torch.Tensor:
            return row_skipping_linear(input, module.weight, module.bias, chosen)  # type: ignore[arg-type]

        return forward

    def takes_adapter(self, module: nn.Module) -> bool | None:
        """Not if the layer computes something else, or is never called: `nn.MultiheadAttention` reads its weights."""
        if not isinstance(module, nn.Linear):
            return None
        plain = self.skips(module) or type(module).__name__ in LIKE_LINEAR
        return plain and not isinstance(module, NonDynamicallyQuantizableLinear)


class Transposed(LayerKind):
    """transformers' `Conv1D` (GPT-2), weight `(in, out)`."""

    name = "conv1d"
    types = (Conv1D,)
    columns = True

    def skips(self, module: nn.Module) -> bool:
        """Not in subclasses that override the forward."""
        return isinstance(module, Conv1D) and type(module).forward is Conv1D.forward

    def skipping_forward(self, module: nn.Module, chosen: ChosenRows) -> Callable[..., torch.Tensor]:
        """See `row_skipping_conv1d`."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            return row_skipping_conv1d(x, module.weight, module.bias, chosen)  # type: ignore[arg-type]

        return forward

    def takes_adapter(self, module: nn.Module) -> bool | None:
        """Not in subclasses that override the forward."""
        return self.skips(module) if isinstance(module, Conv1D) else None


class Router(LayerKind):
    """The router of a mixture of experts: a sibling of the experts with a weight `(experts, in)`.

    Its forward returns more than the logits, so they are computed a second time.
    """

    name = "router"

    def recognises(self, name: str, module: nn.Module, modules: Modules) -> bool:
        """A sibling of experts, with a weight of one row per expert and at most a bias besides."""
        experts = getattr(modules.get(name.rpartition(".")[0]), "experts", None)
        shapes = {key: whole_shape(parameter) for key, parameter in module.named_parameters(recurse=False)}
        if not isinstance(experts, nn.Module) or not is_experts(experts) or "weight" not in shapes:
            return False
        if type(module).forward is nn.Linear.forward:  # a plain linear layer, whose output is the logits
            return False
        count = whole_shape(experts.down_proj)[0]  # type: ignore[arg-type]
        is_matrix = len(shapes["weight"]) == 2 and shapes["weight"][0] == count
        return is_matrix and (
            set(shapes) == {"weight"} or (set(shapes) == {"weight", "bias"} and shapes["bias"] == (count,))
        )

    def hook(self, layer: TrackedLayer, sink: Sink) -> RemovableHandle:
        """Compute the logits before the forward: after it, ZeRO-3 has released the weight. The product is small."""

        def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden = inputs[0]
            if sink.wants(layer, module, hidden.shape[:-1]):
                with torch.no_grad():
                    weight, bias = module.weight, getattr(module, "bias", None)
                    sink.record(layer, nn.functional.linear(hidden.to(weight.dtype), weight, bias))  # type: ignore[arg-type]

        return layer.module.register_forward_pre_hook(record)


class Experts(LayerKind):
    """The projections of all experts of a mixture, stored as three-dimensional parameters.

    The rows of each expert are ranked separately, over the tokens routed to it.
    """

    name = "experts"
    tapped = routed = True

    def recognises(self, name: str, module: nn.Module, modules: Modules) -> bool:
        """See `is_experts`."""
        return is_experts(module)

    def layers(self, name: str, module: nn.Module) -> Iterator[TrackedLayer]:
        """Yield one layer per projection."""
        for projection in PROJECTIONS:
            weight = getattr(module, projection, None)
            if not isinstance(weight, nn.Parameter):
                continue
            experts, first, second = whole_shape(weight)
            columns = bool(module.is_transposed)
            rows, length = (second, first) if columns else (first, second)
            bias = f"{name}.{projection}_bias" if module.has_bias else None
            full = f"{name}.{projection}"
            yield TrackedLayer(full, module, self, full, bias, RowLayout(experts, rows, length, columns))

    def tap(self, name: str, layers: Sequence[TrackedLayer], sink: Sink, mask_bias: bool) -> Tap:
        """See `ExpertsTap`."""
        by_projection = {layer.name.rpartition(".")[2]: layer for layer in layers}

        def observe(projection: str, routed: Routed) -> None:
            layer = by_projection.get(projection)
            if layer is not None and sink.wants(layer, layer.module, routed.leading):
                sink.record_routed(layer, routed)

        def learn(leading: torch.Size) -> None:
            for layer in layers if sink.learning else ():
                sink.wants(layer, layer.module, leading)

        return ExpertsTap(name, layers[0].module, observe, mask_bias, learn)

    def skips(self, module: nn.Module) -> bool:
        """The tap skips them."""
        return True


KINDS: list[LayerKind] = [Experts(), Transposed(), Router(), Linear()]
"""The first kind that recognises a module wins."""


def layers_of(name: str, module: nn.Module, modules: Modules) -> Iterator[TrackedLayer]:
    """Yield the layers of a module, trained or not."""
    kind = next((kind for kind in KINDS if kind.recognises(name, module, modules)), None)
    if kind is not None:
        yield from kind.layers(name, module)


def skipping_kind(module: nn.Module) -> LayerKind | None:
    """The kind with a row-skipping forward for the module, if any."""
    return next((kind for kind in KINDS if not kind.tapped and kind.skips(module)), None)


def takes_adapter(module: nn.Module) -> bool | None:
    """Whether a LoRA adapter works on the module; None: peft does not know it as a linear layer."""
    answers = (kind.takes_adapter(module) for kind in KINDS)
    return next((answer for answer in answers if answer is not None), None)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds the experts of a mixture in the form of transformers' experts interface.

    `use_experts_implementation` sets these attributes on the class and its instances; the projections are
    three-dimensional parameters.
    """
    marks = all(hasattr(module, mark) for mark in ("is_transposed", "has_gate", "has_bias", "_apply_gate"))
    return marks and isinstance(getattr(module, "down_proj", None), nn.Parameter)
