"""A model with random weights, and the ways to do a training step on it without the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from cl_dist.benchmarks.harness import Contestant
from cl_dist.benchmarks.shapes import VOCABULARY
from cl_dist.kernels import kept_rows, topk_row_masks
from cl_dist.kernels.rows import RowMask
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cl_dist.config.schema import LoraConfig
from cl_dist.methods.migu.magnitudes import MagnitudeSums
from cl_dist.models.lora import add_lora
from cl_dist.models.skipping import RowSkipper
from cl_dist.models.tracked import tracked_layers, tracked_linears

LORA_B_SPREAD = 0.02
"""A fresh `lora_B` is zero, its outputs are all equal, and every row would be kept."""


@dataclass(frozen=True)
class StepSize:
    """One training step. All values are JSON's, so that other processes can be told."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    tokens: int
    threshold: float
    dtype: str = "float32"
    lora: int | None = None


def build_model(size: StepSize, device: torch.device) -> nn.Module:
    """A Llama in training mode; with `lora` its weights are frozen and adapters trained."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=size.tokens,
        use_cache=False,
    )
    model: Any = LlamaForCausalLM(config)
    model.name_or_path = "random weights"  # peft warns about an empty one
    model = model.to(device, getattr(torch, size.dtype))
    return (model if size.lora is None else _with_adapters(model, size.lora)).train()


def token_ids(size: StepSize, seed: int = 0) -> torch.Tensor:
    """One sequence, `(1, tokens)` int64."""
    return torch.randint(VOCABULARY, (1, size.tokens), generator=torch.Generator().manual_seed(seed))


def _with_adapters(model: Any, rank: int) -> nn.Module:
    adapted = add_lora(model, LoraConfig(r=rank, alpha=2.0 * rank, dropout=0.0), "causal_lm", seed=0)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=LORA_B_SPREAD)
    return adapted


class Way:
    """A way to do forward, backward and mask; this one is plain fine-tuning.

    Args:
        model: In training mode.
        ids: `(1, tokens)` int64 on the model's device.
        threshold: Quantile below which rows are masked.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, threshold: float) -> None:
        self.model, self.ids, self.threshold = model, ids, threshold
        self.layers = tracked_linears(model, "blocks")

    def contestant(self) -> Contestant:
        """Hooks come and go and gradients are dropped outside of the clock."""
        return Contestant(self.step, self.prepare, self.remove)

    def prepare(self) -> None:
        """Start a step without gradients, as the optimiser's `zero_grad` leaves it."""
        self.model.zero_grad(set_to_none=True)
        self.install()

    def install(self) -> None:
        """Put into the model what the way needs."""

    def remove(self) -> None:
        """Take it out again."""

    def step(self) -> None:
        """Forward, backward and mask."""
        self.loss().backward()

    def loss(self) -> torch.Tensor:
        """The model's own mean loss."""
        loss: torch.Tensor = self.model(input_ids=self.ids, labels=self.ids).loss
        return loss


class Masked(Way):
    """MIGU with a backward pass that skips the masked rows."""

    masks: Mapping[str, RowMask]
    """The last step's, by layer name."""

    def install(self) -> None:
        """Hooks that sum magnitudes, and linear layers that skip."""
        self._sums = MagnitudeSums(self.model, tracked_layers(self.model, "blocks"), per_token=True, count_padding=True)
        self._skipper = RowSkipper(self.layers, mask_bias=True)
        self._sums.counting = self._skipper.active = True

    def remove(self) -> None:
        """The layers are as they were."""
        self._sums.remove()
        self._skipper.remove()

    def step(self) -> None:
        """The rows are chosen between forward and backward."""
        loss = self.loss()
        masks = topk_row_masks(self._sums.flat, self._sums.sizes, self.threshold)
        self.masks = dict(zip(self.layers, masks, strict=True))
        self._skipper.choose({name: mask.rows for name, mask in self.masks.items()})
        loss.backward()
        self._sums.clear()
        self._skipper.forget()


class Reference(Way):
    """MIGU as its public code does it: sums kept by hooks, a quantile a layer, gradients multiplied by the mask."""

    def install(self) -> None:
        """Hooks that keep float32 sums of per-token normalised magnitudes."""
        self._sums: dict[str, torch.Tensor] = {}
        self._handles = [layer.register_forward_hook(self._recorder(name)) for name, layer in self.layers.items()]

    def remove(self) -> None:
        """The layers are as they were."""
        for handle in self._handles:
            handle.remove()

    def step(self) -> None:
        """The whole gradient first, the mask afterwards."""
        self.loss().backward()
        for name, layer in self.layers.items():
            magnitude = self._sums[name]
            mask = magnitude >= torch.quantile(magnitude, self.threshold)
            grad = layer.weight.grad
            assert grad is not None
            layer.weight.grad = grad * mask.unsqueeze(1).to(grad.dtype)
        self._sums.clear()

    def _recorder(self, name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        def record(module: nn.Module, _: Any, output: torch.Tensor) -> None:
            magnitude = output.detach().float().abs()
            magnitude = magnitude / magnitude.sum(dim=-1, keepdim=True)
            summed = magnitude.reshape(-1, magnitude.shape[-1]).sum(dim=0)
            self._sums[name] = self._sums[name] + summed if name in self._sums else summed

        return record


WAYS: dict[str, type[Way]] = {"dense": Way, "masked": Masked, "reference": Reference}


def operations(model: nn.Module, size: StepSize) -> dict[str, int]:
    """Arithmetic operations of a dense and of a masked step: matrix products and attention.

    A product of T tokens with an (O, I) weight takes 2 T O I operations, and as many for the gradient of its input and
    for that of its weight. Attention takes 4 T^2 for every feature forward (the mask of the future is not exploited)
    and twice that backward.
    """
    tracked = tracked_linears(model, "blocks")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    dense = 12 * size.tokens**2 * size.hidden * size.layers
    skipped = 0
    for name, linear in linears.items():
        products = 3 if linear.weight.requires_grad else 2
        dense += products * 2 * size.tokens * linear.weight.numel()
        if name in tracked:
            dropped = linear.out_features - kept_rows(linear.out_features, size.threshold)
            skipped += 2 * size.tokens * dropped * linear.in_features
    return {"dense": dense, "masked": dense - skipped}
