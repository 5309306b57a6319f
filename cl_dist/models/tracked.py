"""Which layers MIGU looks at: where their weights, their rows and their outputs are.

A tracked layer is a linear map whose output can be seen in every forward pass and whose gradient can be masked by
output rows. There are four kinds:

- `linear`: `nn.Linear`, weight `(out, in)`;
- `conv1d`: transformers' `Conv1D` (GPT-2), weight `(in, out)`: its rows are columns of what is stored;
- `router`: the choice of experts, a module beside the experts with a weight `(experts, in)`, which puts out more than
  the logits, so that these are computed once more;
- `experts`: one projection of all experts of a mixture, a parameter with three dimensions. Each expert's rows are
  ranked by themselves, over the tokens that were routed to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from cl_dist.errors import BadInput
from cl_dist.kernels import RowLayout
from cl_dist.models.structure import base_model, block_prefixes, head_prefixes, is_below

Kind = Literal["linear", "conv1d", "router", "experts"]
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of the experts' parameters; their biases are called `<name>_bias`."""


@dataclass(frozen=True)
class TrackedLayer:
    """One layer whose output rows are measured and masked."""

    name: str
    """The module's name; of experts, that of the parameter."""
    module: nn.Module
    """Where the output shows: the forward of this module computes it."""
    kind: Kind
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


def tracked_layers(model: nn.Module, layers: Literal["blocks", "all"]) -> dict[str, TrackedLayer]:
    """The trainable linear layers inside the transformer blocks, with `all` those of the output head as well.

    With LoRA the matrices A and B are such layers, each by itself, and the frozen layers beside them are not. The
    keys are the layers' names, in model order.

    Raises:
        BadInput: There is no such layer, or one's weight belongs to another layer as well.
    """
    prefixes = block_prefixes(model) + (head_prefixes(model) if layers == "all" else ())
    tracked = {layer.name: layer for layer in _trainable_layers(model, prefixes)}
    if not tracked:
        raise BadInput(
            f"method.layers: {type(base_model(model)).__name__} has no trainable linear layer inside transformer "
            "blocks, which MIGU needs; use another model, or LoRA"
        )
    _refuse_shared_weights(model, tracked)
    return tracked


def tracked_linears(model: nn.Module, layers: Literal["blocks", "all"]) -> dict[str, nn.Linear]:
    """Those of `tracked_layers` that are plain linear layers, as modules."""
    modules = {name: layer.module for name, layer in tracked_layers(model, layers).items()}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


def row_layouts(model: nn.Module) -> dict[str, RowLayout]:
    """The weights whose output rows are not simply the rows of a matrix, and their biases, by parameter name.

    They are those of `Conv1D` and of experts, anywhere in the model, trained or not.
    """
    layouts: dict[str, RowLayout] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for layer in _layers_of(name, module, {}):
            if layer.kind in ("conv1d", "experts"):
                layouts[layer.weight] = layer.layout
                if layer.kind == "experts" and layer.bias is not None:
                    layouts[layer.bias] = layer.bias_layout
    return layouts


def untracked_matrices(model: nn.Module, tracked: Mapping[str, TrackedLayer]) -> dict[str, str]:
    """Trainable matrices inside the blocks that belong to no tracked layer: by parameter name, whose they are.

    Norms, biases and other vectors are trained whole as
    ever. So are embedding tables (T5's position biases lie in a block), which are no linear map: see
    `tables_in_blocks`.
    """
    owned = {layer.weight for layer in tracked.values()} | {layer.bias for layer in tracked.values()}
    found = _matrices_in_blocks(model)
    return {
        name: type(module).__name__
        for name, module in found.items()
        if name not in owned and not isinstance(module, nn.Embedding)
    }


def tables_in_blocks(model: nn.Module) -> list[str]:
    """Trainable embedding tables inside the blocks, by parameter name."""
    return [name for name, module in _matrices_in_blocks(model).items() if isinstance(module, nn.Embedding)]


def block_parameters(model: nn.Module) -> list[str]:
    """Names of all trainable parameters inside the blocks."""
    prefixes = block_prefixes(model)
    return [name for name, param in model.named_parameters() if param.requires_grad and name.startswith(prefixes)]


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """Shape of the whole parameter, which ZeRO-3 keeps in `ds_shape`."""
    shape: torch.Size = getattr(parameter, "ds_shape", parameter.shape)
    return shape


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether a parameter has two or more dimensions with more than one element."""
    return sum(size > 1 for size in whole_shape(parameter)) >= 2


def any_block(name: str) -> str:
    """The same layer of all blocks under one name: `layers.*.mixer.dt_proj.weight`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def is_experts(module: nn.Module) -> bool:
    """Whether a module holds a mixture's experts as transformers' experts interface has them.

    `use_experts_implementation` puts these marks on the class and its instances; the projections are parameters of
    three dimensions.
    """
    marks = all(hasattr(module, mark) for mark in ("is_transposed", "has_gate", "has_bias", "_apply_gate"))
    return marks and isinstance(getattr(module, "down_proj", None), nn.Parameter)


def _trainable_layers(model: nn.Module, prefixes: tuple[str, ...]) -> Iterator[TrackedLayer]:
    """Every linear layer under each of its names, with a weight that is trained itself."""
    modules = dict(model.named_modules(remove_duplicate=False))
    trained = {id(param) for param in model.parameters() if param.requires_grad}
    for name, module in modules.items():
        if is_below(name, prefixes):
            for layer in _layers_of(name, module, modules):
                if id(_parameter(modules, layer.weight)) in trained:
                    bias = _parameter(modules, layer.bias) if layer.bias else None
                    yield layer if bias is None or id(bias) in trained else _without_bias(layer)


def _without_bias(layer: TrackedLayer) -> TrackedLayer:
    return TrackedLayer(layer.name, layer.module, layer.kind, layer.weight, None, layer.layout)


def _parameter(modules: Mapping[str, nn.Module], name: str) -> object:
    module, _, parameter = name.rpartition(".")
    return getattr(modules[module], parameter)


def _layers_of(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[TrackedLayer]:
    """The layers that a module is, whether trained or not; `modules` are all of the model, by name."""
    if is_experts(module):
        yield from _projections(name, module)
        return
    kind = _matrix_kind(name, module, modules)
    if kind is not None and isinstance(module.weight, nn.Parameter):
        first, second = whole_shape(module.weight)
        rows, length = (second, first) if kind == "conv1d" else (first, second)
        bias = f"{name}.bias" if isinstance(getattr(module, "bias", None), nn.Parameter) else None
        layout = RowLayout(1, rows, length, columns=kind == "conv1d")
        yield TrackedLayer(name, module, kind, f"{name}.weight", bias, layout)


def _matrix_kind(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> Kind | None:
    if isinstance(module, Conv1D):
        return "conv1d"
    plain = type(module).forward is nn.Linear.forward
    if not plain and _is_router(name, module, modules):
        return "router"
    return "linear" if isinstance(module, nn.Linear) else None


def _is_router(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module has one logit per expert of the experts beside it, by a weight and perhaps a bias alone."""
    parent = modules.get(name.rpartition(".")[0])
    experts = getattr(parent, "experts", None)
    parameters = dict(module.named_parameters(recurse=False))
    if not isinstance(experts, nn.Module) or not is_experts(experts) or not {"weight"} <= set(parameters):
        return False
    count = whole_shape(experts.down_proj)[0]  # type: ignore[arg-type]
    shapes = {key: whole_shape(parameter) for key, parameter in parameters.items()}
    is_matrix = len(shapes["weight"]) == 2 and shapes["weight"][0] == count
    return is_matrix and (
        set(shapes) == {"weight"} or (set(shapes) == {"weight", "bias"} and shapes["bias"] == (count,))
    )


def _projections(name: str, module: nn.Module) -> Iterator[TrackedLayer]:
    for projection in PROJECTIONS:
        weight = getattr(module, projection, None)
        if not isinstance(weight, nn.Parameter):
            continue
        experts, first, second = whole_shape(weight)
        columns = bool(module.is_transposed)
        rows, length = (second, first) if columns else (first, second)
        bias = f"{name}.{projection}_bias" if module.has_bias else None
        full = f"{name}.{projection}"
        yield TrackedLayer(full, module, "experts", full, bias, RowLayout(experts, rows, length, columns))


def _matrices_in_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Trainable parameters inside the blocks with two or more dimensions, and the modules that own them."""
    modules, matrices = dict(model.named_modules(remove_duplicate=False)), {}
    names = set(block_parameters(model))
    for name, parameter in model.named_parameters():
        if name in names and is_matrix(parameter):
            matrices[name] = modules[name.rpartition(".")[0]]
    return matrices


def _refuse_shared_weights(model: nn.Module, tracked: Mapping[str, TrackedLayer]) -> None:
    """Masking a shared weight's rows would also mask what its other owner learns, unseen by the magnitudes."""
    owners: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for layer in tracked.values():
        name = layer.weight.rpartition(".")[0]
        if others := [owner for owner in owners[id(_parameter(modules, layer.weight))] if owner != name]:
            in_blocks = is_below(name, block_prefixes(model))
            allowed = "LoRA or another method" if in_blocks else "method.layers: blocks"
            raise BadInput(
                f"method.layers: the weight of {name} is also that of {others[0]}, whose rows would be masked along; "
                f"allowed for this model is {allowed}"
            )
