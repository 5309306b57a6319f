"""The kinds of linear layers that MIGU tracks, one class each.

A tracked layer is a linear map whose output can be seen in every forward pass and whose gradient can be masked by
output rows. A kind knows which modules it is about, where their weights, rows and biases are, where the output shows,
and how a backward pass skips rows. A new kind is a class here and an entry in `KINDS`.
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
"""Names of the experts' parameters; their biases are called `<name>_bias`."""

LIKE_LINEAR = frozenset(("FalconLinear",))
"""Classes whose own forward does the same as `nn.Linear`'s."""

Modules = Mapping[str, nn.Module]
"""All modules of a model, by name."""


@dataclass(frozen=True)
class TrackedLayer:
    """One layer whose output rows are measured and masked."""

    name: str
    """The module's name; of experts, that of the parameter."""
    module: nn.Module
    """Where the output shows: the forward of this module computes it."""
    kind: LayerKind
    weight: str
    """Name of the weight among `model.named_parameters()`."""
    bias: str | None
    """Name of a trained bias, `(rows,)` or `(experts, rows)`; None: there is none."""
    layout: RowLayout
    """How the rows lie in the flattened weight; one matrix per expert."""

    @property
    def sizes(self) -> list[int]:
        """Rows that are ranked together: one number, or one per expert."""
        return [self.layout.rows] * self.layout.matrices

    @property
    def bias_layout(self) -> RowLayout:
        """How the rows lie in the flattened bias."""
        return self.layout._replace(length=1, columns=False)


class Sink(Protocol):
    """Where the outputs of tracked layers go."""

    @property
    def learning(self) -> bool:
        """Whether the forward pass under way is a trial."""

    def wants(self, layer: TrackedLayer, module: nn.Module, leading: torch.Size | None) -> bool:
        """Whether to record a call whose outputs have this leading shape (None: the output is not one tensor).

        Must be asked once for each call of the layer, also where the answer is no: a trial notes the shapes.
        """

    def record(self, layer: TrackedLayer, output: torch.Tensor) -> None:
        """Take a call's output, `(..., rows)`."""

    def record_routed(self, layer: TrackedLayer, routed: Routed) -> None:
        """Take a call's output of a layer with one matrix per expert."""


class Tap(Protocol):
    """A forward put into a module to show what is computed inside it and, if asked, to skip rows in backward."""

    active: bool
    """Whether forward passes of training are observed."""
    skips: bool
    """Whether backward is to compute the chosen rows alone."""
    rows: dict[str, list[torch.Tensor]] | None
    """By the last part of a layer's name, each matrix's chosen rows, `(kept,)` int64; None: not chosen yet."""

    def remove(self) -> None:
        """Restore the module."""


class LayerKind:
    """One kind of layer. What is written here suits a module with a matrix `weight`, maybe a `bias`, and one output."""

    name: ClassVar[str]
    types: ClassVar[tuple[type[nn.Module], ...]] = ()
    """Classes of modules that are of this kind."""
    columns: ClassVar[bool] = False
    """Whether the weight is stored as `(in, out)`, so that its rows are columns."""
    tapped: ClassVar[bool] = False
    """Whether outputs show in a tap in the module, not in a hook on it."""
    routed: ClassVar[bool] = False
    """Whether a layer has one matrix per expert, each over the tokens that are routed to it."""

    def recognises(self, name: str, module: nn.Module, modules: Modules) -> bool:
        """Whether a module of this name holds layers of this kind."""
        return isinstance(module, self.types)

    def layers(self, name: str, module: nn.Module) -> Iterator[TrackedLayer]:
        """The layers in a recognised module, trained or not."""
        weight = module.weight
        if isinstance(weight, nn.Parameter):
            first, second = whole_shape(weight)
            rows, length = (second, first) if self.columns else (first, second)
            bias = f"{name}.bias" if isinstance(getattr(module, "bias", None), nn.Parameter) else None
            layout = RowLayout(1, rows, length, columns=self.columns)
            yield TrackedLayer(name, module, self, f"{name}.weight", bias, layout)

    def hook(self, layer: TrackedLayer, sink: Sink) -> RemovableHandle:
        """Let the layer's outputs come to `sink` (kinds that are not tapped)."""

        def record(module: nn.Module, _: Any, output: torch.Tensor) -> None:
            leading = output.shape[:-1] if isinstance(output, torch.Tensor) else None
            if sink.wants(layer, module, leading):
                sink.record(layer, output)

        return layer.module.register_forward_hook(record)

    def tap(self, name: str, layers: Sequence[TrackedLayer], sink: Sink, mask_bias: bool) -> Tap:
        """Let the outputs of all tracked layers of one module come to `sink` (kinds that are tapped).

        Args:
            name: The module's name.
            layers: Its tracked layers.
            sink: Takes their outputs.
            mask_bias: Mask the biases' gradients along with the rows that are skipped.
        """
        raise NotImplementedError

    def skips(self, module: nn.Module) -> bool:
        """Whether a backward pass of this module can be made to compute chosen rows of its weight gradient alone."""
        return False

    def skipping_forward(self, module: nn.Module, chosen: ChosenRows) -> Callable[..., torch.Tensor]:
        """The forward that does it, called as the module's own (kinds that skip rows and are not tapped)."""
        raise NotImplementedError

    def takes_adapter(self, module: nn.Module) -> bool | None:
        """Whether peft can put a LoRA adapter around a module; None: it is not one that peft knows of this kind."""
        return None


class Linear(LayerKind):
    """`nn.Linear`, weight `(out, in)`."""

    name = "linear"
    types = (nn.Linear,)

    def skips(self, module: nn.Module) -> bool:
        """Not in subclasses with a forward of their own."""
        return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward

    def skipping_forward(self, module: nn.Module, chosen: ChosenRows) -> Callable[..., torch.Tensor]:
        """See `row_skipping_linear`."""

        def forward(input: torch.Tensor) -> torch.Tensor:
            return row_skipping_linear(input, module.weight, module.bias, chosen)  # type: ignore[arg-type]

        return forward

    def takes_adapter(self, module: nn.Module) -> bool | None:
        """Not where it computes something else, or is never called: `nn.MultiheadAttention` reads its weights."""
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
        """Not in subclasses with a forward of their own."""
        return isinstance(module, Conv1D) and type(module).forward is Conv1D.forward

    def skipping_forward(self, module: nn.Module, chosen: ChosenRows) -> Callable[..., torch.Tensor]:
        """See `row_skipping_conv1d`."""

        def forward(x: torch.Tensor) -> torch.Tensor:
            return row_skipping_conv1d(x, module.weight, module.bias, chosen)  # type: ignore[arg-type]

        return forward

    def takes_adapter(self, module: nn.Module) -> bool | None:
        """Where it computes what its type computes."""
        return self.skips(module) if isinstance(module, Conv1D) else None


class Router(LayerKind):
    """What chooses the experts: a module beside them with a weight `(experts, in)`.

    It returns more than the logits, so these are computed once more.
    """

    name = "router"

    def recognises(self, name: str, module: nn.Module, modules: Modules) -> bool:
        """One logit per expert of the experts beside it, by a weight and perhaps a bias alone."""
        experts = getattr(modules.get(name.rpartition(".")[0]), "experts", None)
        shapes = {key: whole_shape(parameter) for key, parameter in module.named_parameters(recurse=False)}
        if not isinstance(experts, nn.Module) or not is_experts(experts) or "weight" not in shapes:
            return False
        if type(module).forward is nn.Linear.forward:  # whose output are the logits
            return False
        count = whole_shape(experts.down_proj)[0]  # type: ignore[arg-type]
        is_matrix = len(shapes["weight"]) == 2 and shapes["weight"][0] == count
        return is_matrix and (
            set(shapes) == {"weight"} or (set(shapes) == {"weight", "bias"} and shapes["bias"] == (count,))
        )

    def hook(self, layer: TrackedLayer, sink: Sink) -> RemovableHandle:
        """Compute the logits before the forward, because ZeRO-3 releases the weight after it. The product is small."""

        def record(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            hidden = inputs[0]
            if sink.wants(layer, module, hidden.shape[:-1]):
                with torch.no_grad():
                    weight, bias = module.weight, getattr(module, "bias", None)
                    sink.record(layer, nn.functional.linear(hidden.to(weight.dtype), weight, bias))  # type: ignore[arg-type]

        return layer.module.register_forward_pre_hook(record)


class Experts(LayerKind):
    """The projections of all experts of a mixture, parameters with three dimensions.

    Each expert's rows are ranked by themselves, over the tokens that were routed to it.
    """

    name = "experts"
    tapped = routed = True

    def recognises(self, name: str, module: nn.Module, modules: Modules) -> bool:
        """See `is_experts`."""
        return is_experts(module)

    def layers(self, name: str, module: nn.Module) -> Iterator[TrackedLayer]:
        """One for each projection."""
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
        """The tap does it."""
        return True


KINDS: list[LayerKind] = [Experts(), Transposed(), Router(), Linear()]
"""A module is of the first kind that recognises it."""


def layers_of(name: str, module: nn.Module, modules: Modules) -> Iterator[TrackedLayer]:
    """The layers that a module is, whether trained or not; `modules` are all of the model, by name."""
    kind = next((kind for kind in KINDS if kind.recognises(name, module, modules)), None)
    if kind is not None:
        yield from kind.layers(name, module)


def skipping_kind(module: nn.Module) -> LayerKind | None:
    """The kind that has a row-skipping forward for a module; None: there is none."""
    return next((kind for kind in KINDS if not kind.tapped and kind.skips(module)), None)


def takes_adapter(module: nn.Module) -> bool | None:
    """Whether a LoRA adapter can be put around a module; None: peft does not take it for a linear layer."""
    answers = (kind.takes_adapter(module) for kind in KINDS)
    return next((answer for answer in answers if answer is not None), None)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds a mixture's experts as transformers' experts interface has them.

    `use_experts_implementation` puts these marks on the class and its instances; the projections are parameters of
    three dimensions.
    """
    marks = all(hasattr(module, mark) for mark in ("is_transposed", "has_gate", "has_bias", "_apply_gate"))
    return marks and isinstance(getattr(module, "down_proj", None), nn.Parameter)
