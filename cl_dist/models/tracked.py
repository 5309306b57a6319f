"""Finds the linear layers of a model that a method tracks; `models/layer_kinds.py` describes each kind."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn

from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.kernels import RowLayout
from cl_dist.models.layer_kinds import TrackedLayer, layers_of
from cl_dist.models.structure import base_model, block_prefixes, head_prefixes, is_below, whole_shape

SHOWN = 12
"""Most names in a message."""

Layers = Literal["blocks", "all"] | Sequence[str]
"""The layers inside the transformer blocks, those of the output head too, or patterns of layer names."""


def tracked_layers(model: nn.Module, layers: Layers, tied_head: bool = False) -> dict[str, TrackedLayer]:
    """The trainable linear layers that `layers` names, by name, in model order.

    With LoRA, the matrices A and B are tracked as two separate layers; the frozen layer they adapt is not.

    Args:
        model: The model.
        layers: Which layers. A pattern (`*.mlp.*`, as in a shell) has to match at least one of them.
        tied_head: Whether a head that shares its weight with the embedding is tracked too, under the name that the
            weight has in `model.named_parameters()`.

    Raises:
        BadInput: The model has no such layer, or two layers share a weight.
    """
    if isinstance(layers, str):
        prefixes = block_prefixes(model) + (head_prefixes(model) if layers == "all" else ())
        tracked = {layer.name: layer for layer in _trainable_layers(model, lambda name: is_below(name, prefixes))}
    else:
        found = {layer.name: layer for layer in _trainable_layers(model, lambda name: True)}
        tracked = {name: layer for name, layer in found.items() if any(fnmatchcase(name, each) for each in layers)}
        _refuse_unmatched(layers, found)
    if not tracked:
        raise BadInput(
            f"method.layers: {type(base_model(model)).__name__} has no trainable linear layer inside transformer "
            "blocks, which the method needs; use another model, or LoRA"
        )
    _refuse_shared_weights(model, tracked, tied_head)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = dict(model.named_modules(remove_duplicate=False))
    return {
        name: replace(layer, weight=names[id(_parameter(modules, layer.weight))]) for name, layer in tracked.items()
    }


def shares_weight(model: nn.Module, layer: TrackedLayer) -> bool:
    """Whether another module computes with the layer's weight too: an embedding with that of its head."""
    weight = _parameter(dict(model.named_modules(remove_duplicate=False)), layer.weight)
    return sum(each is weight for module in model.modules() for each in module._parameters.values()) > 1


def _refuse_unmatched(patterns: Sequence[str], found: Mapping[str, TrackedLayer]) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in found):
            known = listed(dict.fromkeys(any_block(name) for name in found), SHOWN)
            raise BadInput(f"method.layers: {pattern} matches no trainable linear layer; the model has {known}")


def tracked_linears(model: nn.Module, layers: Layers, tied_head: bool = False) -> dict[str, nn.Linear]:
    """The subset of `tracked_layers` that are `nn.Linear` modules."""
    modules = {name: layer.module for name, layer in tracked_layers(model, layers, tied_head).items()}
    return {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}


def row_layouts(model: nn.Module) -> dict[str, RowLayout]:
    """Layouts of the weights whose output rows are not simply the rows of a matrix, and of their biases.

    These are the weights stored transposed or stacked, anywhere in the model, trained or not. The keys are parameter
    names.
    """
    layouts: dict[str, RowLayout] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        for layer in layers_of(name, module, {}):
            if layer.layout.columns or len(whole_shape(_parameter(modules, layer.weight))) > 2:
                layouts[layer.weight] = layer.layout
            if layer.bias is not None and len(whole_shape(_parameter(modules, layer.bias))) > 1:
                layouts[layer.bias] = layer.bias_layout
    return layouts


def unnamed_layers(model: nn.Module, layers: Layers, tracked: Mapping[str, TrackedLayer]) -> list[str]:
    """Names of the linear layers' weights inside the blocks that no pattern in `layers` matches."""
    if isinstance(layers, str):
        return []
    prefixes = block_prefixes(model)
    weights = {layer.weight for layer in _trainable_layers(model, lambda name: is_below(name, prefixes))}
    return sorted(weights - {layer.weight for layer in tracked.values()})


def untracked_matrices(model: nn.Module, tracked: Mapping[str, TrackedLayer]) -> dict[str, str]:
    """Trainable matrices inside the blocks that belong to no tracked layer, each with the class of its module.

    The keys are parameter names. Norms, biases and other vectors are left out, and so are embedding tables
    (`tables_in_blocks`; T5 keeps its position biases inside a block): both are trained without a mask.
    """
    owned = {layer.weight for layer in tracked.values()} | {layer.bias for layer in tracked.values()}
    found = matrices_in_blocks(model)
    return {
        name: type(module).__name__
        for name, module in found.items()
        if name not in owned and not isinstance(module, nn.Embedding)
    }


def tables_in_blocks(model: nn.Module) -> list[str]:
    """Names of the trainable embedding tables inside the blocks."""
    return [name for name, module in matrices_in_blocks(model).items() if isinstance(module, nn.Embedding)]


def block_parameters(model: nn.Module) -> list[str]:
    """Names of all trainable parameters inside the blocks."""
    prefixes = block_prefixes(model)
    return [name for name, param in model.named_parameters() if param.requires_grad and name.startswith(prefixes)]


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether a parameter has two or more dimensions with more than one element."""
    return sum(size > 1 for size in whole_shape(parameter)) >= 2


def any_block(name: str) -> str:
    """Replace block numbers by a star, so that a layer has one name in all blocks: `layers.*.mixer.dt_proj.weight`."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _trainable_layers(model: nn.Module, wanted: Callable[[str], bool]) -> Iterator[TrackedLayer]:
    """Yield every linear layer in a wanted module whose weight is trained, once for each of its names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    trained = {id(param) for param in model.parameters() if param.requires_grad}
    for name, module in modules.items():
        if wanted(name):
            for layer in layers_of(name, module, modules):
                if id(_parameter(modules, layer.weight)) in trained:
                    bias = _parameter(modules, layer.bias) if layer.bias else None
                    yield layer if bias is None or id(bias) in trained else replace(layer, bias=None)


def _parameter(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    module, _, parameter = name.rpartition(".")
    found: nn.Parameter = getattr(modules[module], parameter)
    return found


def matrices_in_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The trainable matrices inside the blocks, by parameter name, each with the module that owns it."""
    modules, matrices = dict(model.named_modules(remove_duplicate=False)), {}
    names = set(block_parameters(model))
    for name, parameter in model.named_parameters():
        if name in names and is_matrix(parameter):
            matrices[name] = modules[name.rpartition(".")[0]]
    return matrices


def _refuse_shared_weights(model: nn.Module, tracked: Mapping[str, TrackedLayer], tied_head: bool) -> None:
    """Refuse a weight that two modules share: its mask would stop the other module from learning too, although the
    magnitudes never saw that module. The recipe may allow it for a head.
    """
    owners: dict[int, list[str]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for layer in tracked.values():
        name = layer.weight.rpartition(".")[0]
        if others := [owner for owner in owners[id(_parameter(modules, layer.weight))] if owner != name]:
            in_blocks = is_below(name, block_prefixes(model))
            if tied_head and not in_blocks:
                continue
            allowed = "LoRA or another method" if in_blocks else "method.layers: blocks, or method.tied_head: mask"
            raise BadInput(
                f"method.layers: {name} shares its weight with {others[0]}, whose rows would be masked too; "
                f"allowed for this model is {allowed}"
            )
