"""Skipping rows in backward gives the same gradients as zeroing them afterwards, whatever surrounds the layer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cl_dist.errors import BadInput, ClDistError
from cl_dist.models.skipping import RowSkipper
from cl_dist.models.tracked import tracked_linears
from cl_dist.models.training_mode import enable_activation_checkpointing
from tests.distributed.worlds import mean_loss, micro_batches, odd_lora, odd_model, samples

FAMILIES = ("llama", "t5", "roberta")
BUILDERS = {"full": odd_model, "lora": odd_lora}


def rows_of(layers: dict[str, nn.Linear], seed: int = 0) -> dict[str, torch.Tensor]:
    """Choose about a third of each layer's rows, at least one."""
    draw = torch.Generator().manual_seed(seed)
    counts = {name: layer.out_features for name, layer in layers.items()}
    return {name: torch.randperm(n, generator=draw)[: 1 + n // 3].sort().values for name, n in counts.items()}


def gradients(model: nn.Module, family: str, amp: AbstractContextManager[Any] | None = None) -> dict[str, torch.Tensor]:
    """The gradients of one batch, by parameter name."""
    (batch,) = micro_batches(family, samples(family, 4), 4)
    model.train()
    model.zero_grad()
    with amp or nullcontext():
        loss = mean_loss(batch, family, batch.targets)(model)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def masked_after_backward(
    grads: dict[str, torch.Tensor], rows: dict[str, torch.Tensor], bias: bool = True
) -> dict[str, torch.Tensor]:
    """The gradients with all other rows set to zero."""
    result = {name: grad.clone() for name, grad in grads.items()}
    for layer, kept in rows.items():
        for name in (f"{layer}.weight", f"{layer}.bias") if bias else (f"{layer}.weight",):
            if name in result:
                dropped = torch.ones(len(result[name]), dtype=torch.bool)
                dropped[kept] = False
                result[name][dropped] = 0
    return result


def assert_same(skipped: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], epsilon: float) -> None:
    """Assert the same zero rows, and differences within `epsilon` times the largest element of each tensor."""
    assert skipped.keys() == expected.keys()
    for name, grad in skipped.items():
        assert grad.dtype == expected[name].dtype
        if grad.dim() == 2:
            assert torch.equal((grad == 0).all(1), (expected[name] == 0).all(1)), name
        error = (grad.float() - expected[name].float()).abs().max()
        assert error <= epsilon * expected[name].float().abs().max(), (name, error)


def compare(model: nn.Module, family: str, epsilon: float = 2e-6, **amp: Any) -> None:
    """Compare skipping rows with masking the gradients of a copy after backward."""
    layers = tracked_linears(model, "blocks")
    rows = rows_of(layers)
    dense = gradients(copy.deepcopy(model), family, **amp)
    skipper = RowSkipper(layers)
    skipper.active = True
    skipper.choose(rows)
    assert_same(gradients(model, family, **amp), masked_after_backward(dense, rows), epsilon)


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recompute", [False, True])
def test_equals_mask_after_backward(family: str, kind: str, recompute: bool) -> None:
    model = BUILDERS[kind](family)
    if recompute:
        enable_activation_checkpointing(model)
    compare(model, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family: str) -> None:
    compare(odd_model(family).to(torch.bfloat16), family, epsilon=2**-7)


@pytest.mark.parametrize("kind", BUILDERS)
def test_autocast(kind: str) -> None:
    compare(BUILDERS[kind]("llama"), "llama", epsilon=2**-7, amp=torch.autocast("cpu", torch.bfloat16))


def test_compiled_models_work() -> None:
    model = odd_model("llama")
    layers = tracked_linears(model, "blocks")
    rows = rows_of(layers)
    dense = gradients(copy.deepcopy(model), "llama")
    skipper = RowSkipper(layers)
    compiled = torch.compile(model, backend="aot_eager")  # traces the backward pass too
    skipper.active = True
    for seed in (0, 1):  # the first mask must not be baked into the graph
        rows = rows_of(layers, seed)
        skipper.choose(rows)
        grads = {name.removeprefix("_orig_mod."): grad for name, grad in gradients(compiled, "llama").items()}
        assert_same(grads, masked_after_backward(dense, rows), 2e-6)


def test_full_graph_compilation_is_refused(skipped: tuple[nn.Linear, RowSkipper]) -> None:
    compiled = torch.compile(nn.Sequential(skipped[0], nn.ReLU()), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="the rows that backward computes are chosen anew"):
        compiled(torch.randn(2, 3))


def test_reentrant_checkpointing() -> None:
    layer = nn.Linear(5, 7)
    x = torch.randn(4, 5, requires_grad=True)
    skipper = RowSkipper({"l": layer})
    skipper.active = True
    output = checkpoint(layer, x, use_reentrant=True)
    skipper.choose({"l": torch.tensor([2, 5])})
    output.sum().backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad.abs().sum(1) > 0, torch.tensor([0, 0, 1, 0, 0, 1, 0], dtype=torch.bool))


def test_a_layer_that_runs_twice_adds_both_gradients() -> None:
    layer, x = nn.Linear(6, 6), torch.randn(3, 6)
    layer(layer(x)).sum().backward()
    rows = {"l": torch.tensor([0, 4])}
    expected = masked_after_backward({f"l.{n}": p.grad.clone() for n, p in layer.named_parameters()}, rows)
    layer.zero_grad()
    skipper = RowSkipper({"l": layer})
    skipper.active = True
    skipper.choose(rows)
    layer(layer(x)).sum().backward()
    assert_same({f"l.{n}": p.grad for n, p in layer.named_parameters()}, expected, 2e-6)


@pytest.mark.parametrize("mask_bias", [True, False])
def test_the_bias_follows_or_is_left_alone(mask_bias: bool) -> None:
    layer, x = nn.Linear(5, 4), torch.randn(2, 3, 5)
    skipper = RowSkipper({"l": layer}, mask_bias)
    skipper.active = True
    skipper.choose({"l": torch.tensor([1])})
    layer(x).sum().backward()
    assert layer.bias.grad.tolist() == ([0, 6, 0, 0] if mask_bias else [6, 6, 6, 6])


def test_an_input_without_gradient_and_a_frozen_bias() -> None:
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    layer.bias.requires_grad_(False)
    skipper = RowSkipper({"l": layer})
    skipper.active = True
    skipper.choose({"l": torch.tensor([3])})
    layer(x).sum().backward()
    assert layer.bias.grad is None
    torch.testing.assert_close(layer.weight.grad[3], x.sum(0))


class Surroundings:
    """A layer with foreign hooks."""

    def __init__(self) -> None:
        self.layer, self.seen = nn.Linear(3, 2), list[str]()
        self.layer.register_forward_pre_hook(lambda *_: self.seen.append("before"))
        self.layer.register_forward_hook(lambda *_: self.seen.append("after"))
        self.layer.register_full_backward_hook(lambda *_: self.seen.append("backward"))


def test_foreign_hooks_run_and_stay() -> None:
    around = Surroundings()
    skipper = RowSkipper({"l": around.layer})
    skipper.active = True
    skipper.choose({"l": torch.tensor([0])})
    around.layer(torch.randn(2, 3, requires_grad=True)).sum().backward()
    skipper.remove()
    around.layer(torch.randn(2, 3, requires_grad=True)).sum().backward()
    assert around.seen == ["before", "after", "backward"] * 2


def test_removal_leaves_no_trace() -> None:
    layer = nn.Linear(3, 2)
    before = dict(layer.__dict__)
    RowSkipper({"l": layer}).remove()
    assert layer.__dict__ == before
    assert layer.forward.__func__ is nn.Linear.forward  # type: ignore[attr-defined]


@pytest.fixture
def skipped() -> tuple[nn.Linear, RowSkipper]:
    """A layer set to skip rows, before any are chosen."""
    layer = nn.Linear(3, 2)
    skipper = RowSkipper({"blocks.0.up": layer})
    skipper.active = True
    return layer, skipper


def test_without_chosen_rows_backward_is_refused(skipped: tuple[nn.Linear, RowSkipper]) -> None:
    layer, skipper = skipped
    output = layer(torch.randn(2, 3))
    skipper.choose({"blocks.0.up": torch.tensor([0])})
    skipper.forget()
    with pytest.raises(
        ClDistError, match=r"layer blocks\.0\.up: backward ran before the rows of this step were chosen"
    ):
        output.sum().backward()


def evaluating(layer: nn.Linear, skipper: RowSkipper) -> None:
    layer.eval()


def inactive(layer: nn.Linear, skipper: RowSkipper) -> None:
    skipper.active = False


@pytest.mark.parametrize("state", [evaluating, inactive])
def test_outside_masked_training_the_layer_is_unchanged(
    skipped: tuple[nn.Linear, RowSkipper], state: Callable[[nn.Linear, RowSkipper], None]
) -> None:
    layer, skipper = skipped
    state(layer, skipper)
    output = layer(torch.randn(2, 3))
    assert type(output.grad_fn).__name__ == "AddmmBackward0"
    output.sum().backward()
    assert (layer.weight.grad != 0).all()


class Quantised(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input.round())


def patched() -> nn.Linear:
    layer = nn.Linear(3, 2)
    layer.forward = lambda input: input  # type: ignore[method-assign,assignment]
    return layer


@pytest.mark.parametrize("layer", [Quantised(3, 2), patched()], ids=["subclass", "patched"])
def test_a_foreign_forward_is_refused(layer: nn.Linear) -> None:
    forward = layer.__dict__.get("forward")
    with pytest.raises(BadInput, match=r"method\.skip_rows: the forward of layer l .* replaced by tests\.models"):
        RowSkipper({"l": layer})
    assert layer.__dict__.get("forward") is forward


def test_two_skippers_do_not_fight_for_a_layer() -> None:
    layer = nn.Linear(3, 2)
    RowSkipper({"l": layer})
    with pytest.raises(BadInput, match=r"has been replaced by cl_dist\.models\.skipping"):
        RowSkipper({"l": layer})


def test_double_backward_is_refused_by_autograd(skipped: tuple[nn.Linear, RowSkipper]) -> None:
    layer, skipper = skipped
    skipper.choose({"blocks.0.up": torch.tensor([0])})
    x = torch.randn(2, 3, requires_grad=True)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
