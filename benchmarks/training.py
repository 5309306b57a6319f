"""A model with random weights, and variants of a training step on it, without the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from cl_dist.benchmarks.harness import Contestant
from cl_dist.benchmarks.shapes import VOCABULARY
from cl_dist.kernels import importance_update_, kept_rows, topk_row_masks
from cl_dist.kernels.rows import RowMask
from cl_dist.methods.migu.magnitudes import MagnitudeSums
from cl_dist.models.skipping import RowSkipper
from cl_dist.models.tracked import tracked_layers, tracked_linears

LORA_B_SPREAD = 0.02
"""Initialises `lora_B`; with zeros, all its outputs would be equal and every row would be kept."""


@dataclass(frozen=True)
class StepSize:
    """The size of one training step. All values are JSON, so that they can be passed to other processes."""

    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    layers: int
    tokens: int
    threshold: float
    dtype: str = "float32"
    lora: int | None = None


def llama_config(size: StepSize) -> LlamaConfig:
    """The configuration of the model in `build_model`."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        max_position_embeddings=size.tokens,
        use_cache=False,
    )


def build_model(size: StepSize, device: torch.device) -> nn.Module:
    """A Llama in training mode; with `lora`, only adapters are trained."""
    torch.manual_seed(0)
    with device:  # drawing billions of random weights takes minutes on a CPU
        model: Any = LlamaForCausalLM(llama_config(size)).to(getattr(torch, size.dtype))
    model.name_or_path = "random weights"  # peft warns about an empty one
    if size.lora is not None:
        # Imported here, because plain steps need neither peft's nor the recipes' packages.
        from cl_dist.config.schema import LoraConfig
        from cl_dist.models.lora import add_lora

        model = add_lora(model, LoraConfig(r=size.lora, alpha=2.0 * size.lora, dropout=0.0), "causal_lm", seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=LORA_B_SPREAD)
    trained: nn.Module = model.train()
    return trained


def token_ids(size: StepSize, seed: int = 0) -> torch.Tensor:
    """One sequence, `(1, tokens)` int64."""
    return torch.randint(VOCABULARY, (1, size.tokens), generator=torch.Generator().manual_seed(seed))


class Way:
    """A variant of forward, backward and mask; this one is plain fine-tuning.

    Args:
        model: In training mode.
        ids: `(1, tokens)` int64 on the model's device.
        threshold: Quantile below which rows are masked.
    """

    def __init__(self, model: nn.Module, ids: torch.Tensor, threshold: float) -> None:
        self.model, self.ids, self.threshold = model, ids, threshold
        self.layers = tracked_linears(model, "blocks")

    def contestant(self) -> Contestant:
        """The variant as a contestant; hooks and old gradients are handled outside of the measured time."""
        return Contestant(self.step, self.prepare, self.remove)

    def prepare(self) -> None:
        """Clear the gradients, as the optimiser's `zero_grad` does, and install the variant."""
        self.model.zero_grad(set_to_none=True)
        self.install()

    def install(self) -> None:
        """Install the variant's hooks in the model."""

    def remove(self) -> None:
        """Remove them."""

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
    """The masks of the last step, by layer name."""

    def install(self) -> None:
        """Install hooks that sum magnitudes, and make linear layers skip rows."""
        self._sums = MagnitudeSums(self.model, tracked_layers(self.model, "blocks"), per_token=True, count_padding=True)
        self._skipper = RowSkipper(self.layers, mask_bias=True)
        self._sums.counting = self._skipper.active = True

    def remove(self) -> None:
        """The layers are as they were."""
        self._sums.remove()
        self._skipper.remove()

    def step(self) -> None:
        """Select the rows between forward and backward."""
        loss = self.loss()
        # The masks must be known before backward, which then skips the rows.
        masks = topk_row_masks(self._sums.flat, self._sums.sizes, self.threshold)
        self.masks = dict(zip(self.layers, masks, strict=True))
        self._skipper.choose({name: mask.rows for name, mask in self.masks.items()})
        loss.backward()
        self._sums.clear()
        self._skipper.forget()


class Reference(Way):
    """MIGU like its public code: hooks that sum magnitudes, a quantile per layer, gradients multiplied by the mask."""

    def install(self) -> None:
        """Install hooks that sum the magnitudes, normalised per token, in float32."""
        self._sums: dict[str, torch.Tensor] = {}
        self._handles = [layer.register_forward_hook(self._recorder(name)) for name, layer in self.layers.items()]

    def remove(self) -> None:
        """The layers are as they were."""
        for handle in self._handles:
            handle.remove()

    def step(self) -> None:
        """Compute whole gradients, then mask them."""
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


class Important(Way):
    """KIF's share of a plain step: after backward, one update of both importance states of every trained parameter."""

    def __init__(self, model: nn.Module, ids: torch.Tensor, threshold: float) -> None:
        super().__init__(model, ids, threshold)
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._states: list[tuple[torch.Tensor, torch.Tensor]] = []

    def install(self) -> None:
        """Set up the states in float32, before the first step."""
        if not self._states:
            flat = [parameter.detach().flatten() for parameter in self._trained]
            self._states = [tuple(torch.zeros_like(one, dtype=torch.float32) for _ in range(2)) for one in flat]  # type: ignore[misc]

    def step(self) -> None:
        """Measure after backward."""
        self.loss().backward()
        for parameter, states in zip(self._trained, self._states, strict=True):
            if parameter.grad is not None:
                importance_update_(parameter.detach().flatten(), parameter.grad.flatten(), *states)


WAYS: dict[str, type[Way]] = {"dense": Way, "masked": Masked, "reference": Reference}


def operations(model: nn.Module, size: StepSize) -> dict[str, int]:
    """Number of arithmetic operations in the matrix products and the attention of a dense and of a masked step.

    Multiplying T tokens by an (O, I) weight takes 2 T O I operations, and so do the gradient of its input and that of
    its weight. Attention takes 4 T^2 operations per feature in the forward pass (without exploiting the causal mask),
    and twice as many in the backward pass.
    """
    tracked = tracked_linears(model, "blocks")
    linears = {name: module for name, module in model.named_modules() if type(module) is nn.Linear}
    dense = 12 * size.tokens**2 * size.hidden * size.layers  # attention
    skipped = 0
    for name, linear in linears.items():
        products = 3 if linear.weight.requires_grad else 2  # forward, input gradient, and weight gradient if trained
        dense += products * 2 * size.tokens * linear.weight.numel()
        if name in tracked:
            dropped = linear.out_features - kept_rows(linear.out_features, size.threshold)
            skipped += 2 * size.tokens * dropped * linear.in_features
    return {"dense": dense, "masked": dense - skipped}
