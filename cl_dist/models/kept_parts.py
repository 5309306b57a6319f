"""Trains a part of a weight alone, as a small parameter of its own; the rest of the weight is frozen.

Where it is known for a whole task which rows, columns or elements of a weight may move, the weight itself needs no
gradient. The part becomes a parameter `kept` of the same layer, and whatever the optimiser, ZeRO and the network do for
a parameter, they do for the part alone: gradient, float32 master, moments, reduction, clipping, offload, checkpoints.
The layer computes with the whole weight, into which the part is copied after every step (under ZeRO-3 whenever it is
gathered). Backward computes the part's gradient and nothing for the rest, in every micro-batch, also with accumulation
and activation checkpointing. (The gradient of single elements is picked out of the whole weight's, which is dropped
right after that.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from cl_dist.errors import BadInput
from cl_dist.kernels import column_weight_grad, kept_weight_grad
from cl_dist.models.row_gradients import autocast_like_linear, own_memory
from cl_dist.models.structure import is_sharded, whole_shape

KEPT, KEPT_BIAS = "kept", "kept_bias"
"""Names of a layer's parameters that hold the trained part of its weight and bias."""
Along = Literal["rows", "columns", "elements"]
"""What a part consists of: output rows, or input columns of a linear layer; the rows of an embedding are its words. Or
single elements, numbered as the weight is stored."""


@dataclass(frozen=True)
class Part:
    """The part of a weight that is trained, before it is known which."""

    weight: str
    """Name of the weight in `model.named_parameters()`."""
    along: Along
    count: int
    """Number of trained rows, columns or elements, at least 1."""


Scorer = Callable[["KeptPart", torch.Tensor], None]
"""Gets a part and a gradient of the whole weight, as the weight is stored. Of a weight that several layers share, or
that a layer uses several times, it gets several gradients, which add up."""
_MOST_INT32 = 2**31 - 1


class KeptPart:
    """The trained part of one weight, installed in every layer that computes with that weight.

    Args:
        part: What is trained.
        layers: The layers that share the weight (an embedding and its tied head), the owner of the name first.
        bias: Whether to train the same rows of the bias, rather than leaving it as it is.
    """

    def __init__(self, part: Part, layers: Sequence[nn.Module], bias: bool) -> None:
        first = layers[0]
        self.part, self.layers = part, tuple(layers)
        self.axis = _axis(first, part.along)
        """The axis of the stored weight along which rows or columns are counted; of elements, which `by_unit` puts into
        a column, 0."""
        weight = first.weight
        assert isinstance(weight, nn.Parameter)
        shape = list(self.shape_by_unit(whole_shape(weight)))
        self.size = shape[self.axis]
        """How many rows, columns or elements the weight has."""
        shape[self.axis] = part.count
        self.indices = torch.arange(part.count, device=weight.device, dtype=self.index_dtype)
        """`(count,)` of `index_dtype`, ascending: which are trained."""
        self.active = False
        """Whether `kept` holds the values of the trained part, so that the layer computes with it."""
        self.scorer: Scorer | None = None
        """Gets the whole weight's gradient of every backward pass, instead of the trained part's; None: nobody does."""
        weight.requires_grad_(False)
        kept = nn.Parameter(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
        self.bias = bias and part.along == "rows" and isinstance(getattr(first, "bias", None), nn.Parameter)
        for layer in layers:
            layer.register_parameter(KEPT, kept)
            layer.forward = _forward(layer, self)
        if self.bias:
            first.bias.requires_grad_(False)
            first.register_parameter(KEPT_BIAS, nn.Parameter(kept.new_zeros(part.count)))

    @property
    def index_dtype(self) -> torch.dtype:
        """Of `indices`: of elements there are many, and four bytes number all but the largest weights'."""
        return torch.int32 if self.part.along == "elements" and self.size <= _MOST_INT32 else torch.int64

    def shape_by_unit(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of `by_unit` of a weight of this shape."""
        return (prod(shape), 1) if self.part.along == "elements" else tuple(shape)

    def by_unit(self, whole: torch.Tensor) -> torch.Tensor:
        """View a whole weight so that `axis` counts what is trained: elements lie one below the other."""
        return whole.view(-1, 1) if self.part.along == "elements" else whole

    @property
    def names(self) -> Iterator[tuple[str, str, int]]:
        """The names of each trained part and of the parameter it belongs to, and the axis of its rows or columns."""
        layer = self.part.weight.rpartition(".")[0]
        yield f"{layer}.{KEPT}", self.part.weight, self.axis
        if self.bias:
            yield f"{layer}.{KEPT_BIAS}", f"{layer}.bias", 0

    @torch.no_grad()
    def overlay(self) -> None:
        """Copy the trained part into the weight that the layers compute with, which must be whole on this rank."""
        for layer in self.layers:
            self.overlay_weight(layer.get_parameter("weight"), layer.get_parameter(KEPT))
            if (kept := layer._parameters.get(KEPT_BIAS)) is not None:
                _copy_into(layer.get_parameter("bias"), 0, self.indices, kept)

    def overlay_weight(self, weight: torch.Tensor, kept: torch.Tensor) -> None:
        """Copy the trained part into a whole weight."""
        _copy_into(self.by_unit(weight.data), self.axis, self.indices, kept)

    def remove(self) -> None:
        """Restore the layers; the weight stays frozen."""
        for layer in self.layers:
            layer.__dict__.pop("forward", None)
            for name in (KEPT, KEPT_BIAS):
                layer._parameters.pop(name, None)


def install(model: nn.Module, parts: Sequence[Part], bias: bool = True) -> list[KeptPart]:
    """Freeze the weights of `parts` and put their trained parts beside them; before an engine is built.

    Args:
        model: Any model; under ZeRO-3 its weights may be sharded already.
        parts: At most one for each weight.
        bias: Whether a layer of which rows are trained trains the same rows of its bias; else the bias is left as it
            is.

    Raises:
        BadInput: A weight is not that of a linear layer or an embedding, or has not that many rows or columns.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[int, list[nn.Module]] = {}
    for module in dict.fromkeys(modules.values()):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(module)
    return [KeptPart(part, _layers_of(part, modules, owners), bias) for part in parts]


def is_kept(name: str) -> bool:
    """Whether a parameter holds the trained part of another, which has its values too once a task is over."""
    return name.rpartition(".")[2] in (KEPT, KEPT_BIAS)


def _layers_of(
    part: Part, modules: Mapping[str, nn.Module], owners: Mapping[int, Sequence[nn.Module]]
) -> Sequence[nn.Module]:
    """The layers that compute with a part's weight, its own first."""
    name, _, parameter = part.weight.rpartition(".")
    module = modules.get(name)
    if module is None or parameter != "weight" or not isinstance(module._parameters.get("weight"), nn.Parameter):
        raise BadInput(f"method: {part.weight} is not a weight of this model")
    sharing = owners[id(module.weight)]
    layers = [module, *(each for each in sharing if each is not module)]
    for layer in layers:
        if not _plain(layer) or "forward" in layer.__dict__:
            raise BadInput(
                f"method: {part.weight} belongs to a {type(layer).__name__}, of which no part can be trained alone; "
                "allowed are linear layers and embeddings"
            )
    if len({_axis(layer, part.along) for layer in layers}) > 1 or (len(layers) > 1 and part.along == "columns"):
        raise BadInput(f"method: {part.weight} is shared by several layers; allowed for it are rows, not columns")
    if isinstance(module, nn.Embedding) and part.along == "columns":
        raise BadInput(f"method: {part.weight} is an embedding; allowed for it are rows, not columns")
    shape = whole_shape(module.weight)  # type: ignore[arg-type]
    size = shape.numel() if part.along == "elements" else shape[_axis(module, part.along)]
    if not 1 <= part.count <= size:
        raise BadInput(f"method: {part.weight} has {size} {part.along}, of which {part.count} cannot be trained")
    return layers


def _plain(layer: nn.Module) -> bool:
    """Whether the layer computes what its class is known for."""
    kinds = (nn.Linear, Conv1D, nn.Embedding)
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        return False
    return any(isinstance(layer, kind) and type(layer).forward is kind.forward for kind in kinds)


def _axis(layer: nn.Module, along: Along) -> int:
    """The axis of the stored weight: `(out, in)`, of a Conv1D `(in, out)`."""
    return 0 if along == "elements" else int((along == "columns") != isinstance(layer, Conv1D))


def _copy_into(whole: torch.Tensor, axis: int, indices: torch.Tensor, part: torch.Tensor) -> None:
    # `.data`: the copy is no step of the computation, and the values are those that the part has had all along.
    whole.data.index_copy_(axis, indices.long(), part.data)


def _forward(layer: nn.Module, part: KeptPart) -> Callable[[torch.Tensor], torch.Tensor]:
    """A forward like the layer's own, whose backward computes the gradient of the trained part."""
    plain: Callable[..., torch.Tensor] = type(layer).forward

    @torch.compiler.disable(recursive=True, reason="which rows are trained changes from task to task")
    def forward(inputs: torch.Tensor) -> torch.Tensor:
        # Under ZeRO-3 the weight has just been gathered from shards that the part's values have not reached yet.
        if part.active and is_sharded(layer.weight):  # type: ignore[arg-type]
            part.overlay()
        if not torch.is_grad_enabled():
            return plain(layer, inputs)
        if isinstance(layer, nn.Embedding):
            rows: torch.Tensor = _KeptEmbedding.apply(inputs, layer.kept, layer.weight, layer.padding_idx, part)
            return rows
        bias = layer._parameters.get("bias")
        kept_bias = layer._parameters.get(KEPT_BIAS)
        output: torch.Tensor = _KeptLinear.apply(
            *autocast_like_linear(inputs, layer.kept, kept_bias, layer.weight, bias),  # type: ignore[arg-type]
            isinstance(layer, Conv1D),
            part,
        )
        return output

    return forward


class _KeptLinear(torch.autograd.Function):
    """`Y = X W^T + b` with the whole W; `dX = dY W`, and the gradient of the kept rows or columns of W alone."""

    @staticmethod
    def forward(
        ctx: Any,
        input: torch.Tensor,
        kept: torch.Tensor,
        kept_bias: torch.Tensor | None,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        transposed: bool,
        part: KeptPart,
    ) -> torch.Tensor:
        ctx.chosen = _saves_columns(part)
        ctx.save_for_backward(input.index_select(-1, part.indices) if ctx.chosen else input, kept, weight)
        ctx.part, ctx.transposed = part, transposed
        matrix = weight.t() if transposed else weight
        return own_memory(nn.functional.linear(input, matrix, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        input, kept, weight = ctx.saved_tensors
        part: KeptPart = ctx.part
        needs_input, needs_kept, needs_kept_bias, _, needs_bias, *_ = ctx.needs_input_grad
        grad_input = grad_kept = grad_kept_bias = grad_bias = None
        if needs_input:
            if part.active and is_sharded(weight):  # gathered once more
                part.overlay_weight(weight, kept)
            grad_input = grad_output @ (weight.t() if ctx.transposed else weight)
        if needs_kept:
            if part.part.along == "columns":
                columns = None if ctx.chosen else part.indices
                grad_kept = column_weight_grad(input, grad_output, columns, transposed=ctx.transposed)
            else:
                rows = part.indices if part.part.along == "rows" else None
                grad_kept = kept_weight_grad(input, grad_output, rows)
                grad_kept = grad_kept.t().contiguous() if ctx.transposed else grad_kept
            if part.part.along == "elements":
                grad_kept = _picked(part, grad_kept, kept.shape)
        if needs_kept_bias or needs_bias:
            whole = grad_output.reshape(-1, grad_output.shape[-1]).sum(0)
            grad_kept_bias = whole.index_select(0, part.indices) if needs_kept_bias else None
            grad_bias = whole if needs_bias else None
        return grad_input, grad_kept, grad_kept_bias, None, grad_bias, None, None


def _saves_columns(part: KeptPart) -> bool:
    """Whether a layer saves the kept columns of its input for backward, which needs no others, or the whole input.

    The whole input costs no copy, and on a GPU the kernel may read its columns in place. It costs no memory either
    where somebody else keeps it: layers with the same input (query, key and value; up and gate) keep one tensor
    together, but a copy of their columns each, and fused attention keeps its output, the input of the output layer. In
    units of the width, a Llama block keeps 1 + 0 + 1 + 2.7 whole inputs (before query, output, up and down), or a share
    k of 3 + 1 + 2 + 2.7: less memory for all of them together while k is below 0.54.
    """
    return part.part.along == "columns" and 2 * part.part.count < part.size


def _picked(part: KeptPart, grad: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """The gradient of the trained elements, out of the whole weight's as it is stored."""
    if part.scorer is not None:
        part.scorer(part, grad)
        return grad.sum().expand(shape)  # so that the engine sees whether the whole gradient is finite
    return part.by_unit(grad).index_select(0, part.indices).view(shape)


class _KeptEmbedding(torch.autograd.Function):
    """`Y = E[ids]` with the whole table; the gradient of its kept rows or elements alone."""

    @staticmethod
    def forward(
        ctx: Any, ids: torch.Tensor, kept: torch.Tensor, weight: torch.Tensor, padding: int | None, part: KeptPart
    ) -> torch.Tensor:
        everywhere = part.part.along == "elements"
        rows = torch.arange(weight.shape[0], device=ids.device) if everywhere else part.indices
        places = torch.full((weight.shape[0],), -1, device=ids.device)
        places[rows] = torch.arange(len(rows), device=ids.device)
        if padding is not None:
            places[padding] = -1
        ctx.save_for_backward(places[ids.reshape(-1)])
        ctx.rows, ctx.shape, ctx.part = len(rows), kept.shape, part
        return own_memory(nn.functional.embedding(ids, weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (places,) = ctx.saved_tensors
        chosen = places >= 0
        rows = grad_output.reshape(-1, grad_output.shape[-1])[chosen]
        # As PyTorch's own backward of an embedding: rows of equal words are added up.
        grad = torch.ops.aten.embedding_dense_backward(rows, places[chosen], ctx.rows, -1, False)
        part: KeptPart = ctx.part
        if part.part.along == "elements":
            return None, _picked(part, grad, ctx.shape), None, None, None
        return None, grad.view(ctx.shape), None, None, None
