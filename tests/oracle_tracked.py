"""MIGU in plain PyTorch for layers of every kind: the truth for experts, transposed weights and flattened tokens.

Written from the definition, without a line of cl_dist. Outputs are recomputed from what goes into a module, which is
slow and easy to believe: a linear layer's from its input, an expert's two projections from the tokens that its router
sent to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

Forwards = Sequence[tuple[Callable[[nn.Module], torch.Tensor], torch.Tensor]]
"""(function from model to loss, real tokens as bool (batch, length))."""


class DenseTracked:
    """One model on one process, with AdamW as the tests' recipes have it."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        self.model, self.config = model, config
        self.parameters = dict(model.named_parameters())
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-2, weight_decay=0.0)
        self.keep: dict[str, torch.Tensor] = {}
        """By weight: bool `(rows,)`, of experts `(experts, rows)`."""

    def spread(self, name: str, keep: torch.Tensor) -> torch.Tensor:
        """A mask of rows (of all experts one after the other) as one of the weight's or bias's own shape."""
        shape = self.parameters[name].shape
        if name.endswith("bias"):
            return keep.view(shape)
        module: Any = self.model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, Conv1D) or getattr(module, "is_transposed", False):
            return keep.view(*shape[:-2], 1, shape[-1]).expand(shape)
        return keep.view(*shape[:-1], 1).expand(shape)

    def step(self, forwards: Forwards, chosen: dict[str, torch.Tensor]) -> None:
        """One step on the sum of the losses; masked by `chosen`, while `keep` is what this class finds by itself."""
        sums: dict[str, torch.Tensor] = {}
        for loss_of, real in forwards:
            handles = [
                module.register_forward_pre_hook(self._recorder(name, real, sums), with_kwargs=True)
                for name, module in self.model.named_modules()
                if "layers." in name or ".h." in name or "encoder.layer." in name
            ]
            loss = loss_of(self.model)
            for handle in handles:
                handle.remove()
            loss.backward()
        self.keep = {name: self._top(magnitude) for name, magnitude in sums.items()}
        masks = {name: self.spread(name, keep) for name, keep in chosen.items()}
        for name, mask in masks.items():
            gradient = self.parameters[name].grad
            if gradient is not None:
                gradient[~mask] = 0
        self._update(masks)
        self.optimizer.zero_grad(set_to_none=True)

    def _update(self, masks: dict[str, torch.Tensor]) -> None:
        for parameter in self.parameters.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if not self.optimizer.state[parameter]:
                moments = {name: torch.zeros_like(parameter).detach() for name in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        before = {name: [tensor.detach().clone() for tensor in self._state(name)] for name in masks}
        self.optimizer.step()
        if self.config.mask == "update":
            for name, mask in masks.items():
                for now, old in zip(self._state(name), before[name], strict=True):
                    now.data[~mask] = old[~mask]

    def _top(self, magnitude: torch.Tensor) -> torch.Tensor:
        if magnitude.dim() == 1:
            return magnitude >= torch.quantile(magnitude, self.config.threshold)
        kept = torch.stack([one >= torch.quantile(one, self.config.threshold) for one in magnitude])
        return kept & (magnitude.sum(1, keepdim=True) > 0)  # an expert without a token keeps nothing

    def _recorder(self, name: str, real: torch.Tensor, sums: dict[str, torch.Tensor]) -> Callable[..., None]:
        def add(weight: str, magnitude: torch.Tensor) -> None:
            sums[weight] = sums.get(weight, 0) + magnitude

        @torch.no_grad()
        def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = [*args, *kwargs.values()]
            if hasattr(module, "gate_up_proj") and isinstance(module.gate_up_proj, nn.Parameter):
                for weight, magnitude in _experts(module, inputs, real).items():
                    add(f"{name}.{weight}", magnitude)
            elif (output := _output(module, inputs)) is not None:
                table = "pos_proj" in name or "pos_q_proj" in name  # these run over DeBERTa's positions alone
                tokens = output.reshape(-1, output.shape[-1]) if table else _tokens(output, real)
                if tokens is not None:
                    add(f"{name}.weight", _normalised(tokens).sum(0))

        return record

    def _state(self, name: str) -> list[torch.Tensor]:
        state = self.optimizer.state[self.parameters[name]]
        return [self.parameters[name], state["exp_avg"], state["exp_avg_sq"]]


def _output(module: nn.Module, inputs: list[Any]) -> torch.Tensor | None:
    if isinstance(module, nn.Linear):
        return nn.functional.linear(inputs[0], module.weight, module.bias)
    if isinstance(module, Conv1D):
        return inputs[0] @ module.weight + module.bias
    if type(module).__name__ == "LowRank":
        return inputs[0] @ module.down @ module.weight
    if type(module).__name__.endswith("TopKRouter"):
        return nn.functional.linear(inputs[0], module.weight, getattr(module, "bias", None))
    return None


def _experts(module: Any, inputs: list[Any], real: torch.Tensor) -> dict[str, torch.Tensor]:
    """Magnitudes of both projections, `(experts, rows)`: each over the real tokens that were routed to the expert."""
    hidden, index = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
    sums: dict[str, list[torch.Tensor]] = {"gate_up_proj": [], "down_proj": []}
    for expert in range(module.num_experts):
        mine = (index == expert).any(-1) & real.reshape(-1)
        gate_up, down = module.gate_up_proj[expert], module.down_proj[expert]
        if not module.is_transposed:
            gate_up, down = gate_up.t(), down.t()
        first = hidden[mine] @ gate_up
        if module.has_bias:
            first = first + module.gate_up_proj_bias[expert]
        second = module._apply_gate(first) @ down
        if module.has_bias:
            second = second + module.down_proj_bias[expert]
        sums["gate_up_proj"].append(_normalised(first).sum(0))
        sums["down_proj"].append(_normalised(second).sum(0))
    return {name: torch.stack(each) for name, each in sums.items()}


def _tokens(output: torch.Tensor, real: torch.Tensor) -> torch.Tensor | None:
    """The outputs of real tokens, `(tokens, rows)`; None: these are no tokens (positions of DeBERTa)."""
    if output.dim() == 3 and output.shape[:2] == real.shape:
        return output[real]
    if output.dim() == 2 and len(output) == real.numel():
        return output[real.reshape(-1)]
    return None


def _normalised(tokens: torch.Tensor) -> torch.Tensor:
    magnitudes = tokens.double().abs()
    norm = magnitudes.sum(-1, keepdim=True)
    return torch.where(norm > 0, magnitudes / norm, 0.0)
