from __future__ import annotations

import pytest
import torch

from cl_dist.benchmarks import step
from cl_dist.benchmarks.shapes import VOCABULARY
from cl_dist.benchmarks.training import WAYS, Masked, StepSize, build_model, operations, token_ids
from cl_dist.errors import ClDistError
from cl_dist.kernels import reference
from cl_dist.models import row_gradients
from cl_dist.models.tracked import tracked_linears

CPU = torch.device("cpu")
SIZE = StepSize(
    hidden=32, intermediate=48, heads=2, key_value_heads=1, layers=2, tokens=12, threshold=0.7
)  # fmt: skip
LORA = StepSize(**{**SIZE.__dict__, "lora": 4})
ROUNDING = 1e-5
"""Relative to the largest entry; float32 sums of 12 products in different orders."""


def gradients(way: str, size: StepSize) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    model = build_model(size, CPU)
    contestant = WAYS[way](model, token_ids(size), size.threshold).contestant()
    contestant.prepare()
    contestant.run()
    contestant.finish()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, model


@pytest.mark.parametrize("size", [SIZE, LORA], ids=["full", "lora"])
def test_masked_and_reference_gradients_are_equal(size: StepSize) -> None:
    masked, model = gradients("masked", size)
    other, _ = gradients("reference", size)
    assert masked.keys() == other.keys()
    for name, gradient in masked.items():
        torch.testing.assert_close(gradient, other[name], rtol=1e-4, atol=ROUNDING * float(other[name].abs().max()))
    names = [f"{name}.weight" for name in tracked_linears(model, "blocks")]
    assert all(bool((masked[name] == 0).all(dim=1).any()) for name in names if masked[name].shape[0] > 4)


def test_dense_gradients_have_no_zero_rows_and_the_model_is_restored() -> None:
    dense, model = gradients("dense", SIZE)
    masked, masked_model = gradients("masked", SIZE)
    assert dense.keys() == masked.keys()
    for name, layer in tracked_linears(model, "blocks").items():
        assert not (dense[f"{name}.weight"] == 0).all(dim=1).any()
        assert type(layer) is torch.nn.Linear
    for layer in tracked_linears(masked_model, "blocks").values():
        assert "forward" not in layer.__dict__
        assert not layer._forward_hooks


class TestComparison:
    """`compare_gradients` finds errors."""

    @pytest.fixture
    def model(self) -> torch.nn.Module:
        return build_model(SIZE, CPU)

    def test_no_error(self, model: torch.nn.Module) -> None:
        assert step.compare_gradients(model, token_ids(SIZE), SIZE.threshold)["gradient_error"] < ROUNDING

    def test_a_gradient_that_is_a_little_off(self, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        def off(*args: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
            weight, sums = reference.masked_weight_grad(*args, bias=bias)
            return weight * 1.01, sums

        monkeypatch.setattr(row_gradients, "masked_weight_grad", off)
        error = step.compare_gradients(model, token_ids(SIZE), SIZE.threshold)["gradient_error"]
        assert 0.001 < error < 0.02

    def test_a_masked_row_that_is_not_zero(self, model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        def dense(
            input: torch.Tensor, grad_output: torch.Tensor, rows: torch.Tensor, bias: bool
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            every = torch.arange(grad_output.shape[-1])
            return reference.masked_weight_grad(input, grad_output, every, bias=bias)

        monkeypatch.setattr(row_gradients, "masked_weight_grad", dense)
        with pytest.raises(ClDistError, match=r"gradient of .*weight is not zero in masked rows"):
            step.compare_gradients(model, token_ids(SIZE), SIZE.threshold)


def test_operations_of_a_step() -> None:
    blocks = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    kept = {32: 10, 16: 5, 48: 15}  # N - ceil(0.7 (N - 1))
    dropped = 2 * sum((o - kept[o]) * i for o, i in [(32, 32)] * 2 + [(16, 32)] * 2 + [(48, 32)] * 2 + [(32, 48)])
    dense = 6 * 12 * (blocks + VOCABULARY * 32) + 12 * 12**2 * 32 * 2
    assert operations(build_model(SIZE, CPU), SIZE) == {"dense": dense, "masked": dense - 2 * 12 * dropped}


def test_frozen_layers_have_no_weight_gradient() -> None:
    linears = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48) + VOCABULARY * 32
    adapters = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    model = build_model(LORA, CPU)
    assert operations(model, LORA)["dense"] == 12 * (4 * linears + 6 * adapters) + 12 * 12**2 * 32 * 2


def test_the_same_seed_gives_the_same_model() -> None:
    first, second = build_model(LORA, CPU), build_model(LORA, CPU)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_threshold_determines_the_kept_rows() -> None:
    model = build_model(SIZE, CPU)
    way = Masked(model, token_ids(SIZE), 0.5)
    way.prepare()
    way.step()
    way.remove()
    assert {mask.keep.numel(): int(mask.keep.sum()) for mask in way.masks.values()} == {32: 16, 16: 8, 48: 24}
