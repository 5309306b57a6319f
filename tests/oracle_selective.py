"""The truth about training a part of the weights: one process, dense gradients, masks, and every bit put back.

Written without a line of cl_dist: the gradient is that of the whole model, its dropped elements are zeroed before the
norm is taken, and after AdamW's step dropped elements and their moments get their old bits again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch


def ssu_scores(
    model: torch.nn.Module, samples: Sequence[Mapping[str, torch.Tensor]], names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Source-shielded updates: the score of every column of the weights `names`, each of a layer.

    It is the column's norm times the mean over samples of the mean over tokens of its squared inputs.
    """
    modules = {name: model.get_submodule(name.removesuffix(".weight")) for name in names}
    totals: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def see(_: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            mean = given[0].detach().double().square().mean(tuple(range(given[0].dim() - 1)))
            totals[name] = totals.get(name, 0) + mean / len(samples)

        return modules[name].register_forward_pre_hook(see)

    hooks = [watch(name) for name in names]
    with torch.no_grad():
        for sample in samples:
            model(**sample)
    for hook in hooks:
        hook.remove()
    scores = {}
    for name, module in modules.items():
        weight = module.weight.detach().double()
        scores[name] = (weight.t() if _transposed(module) else weight).norm(dim=0) * totals[name]
    return scores


def ssu_columns(
    model: torch.nn.Module, samples: Sequence[Mapping[str, torch.Tensor]], names: Sequence[str], keep: float
) -> dict[str, torch.Tensor]:
    """True for the elements that are trained: of the columns, a share `1 - keep` with the highest scores is frozen."""
    masks = {}
    for name, score in ssu_scores(model, samples, names).items():
        module = model.get_submodule(name.removesuffix(".weight"))
        frozen = score.topk(int(len(score) * (1 - keep))).indices
        masks[name] = torch.ones_like(module.weight, dtype=torch.bool)
        masks[name][frozen if _transposed(module) else (slice(None), frozen)] = False
    return masks


def _transposed(layer: torch.nn.Module) -> bool:
    """GPT-2's layers store their weights as `(in, out)`."""
    return not isinstance(layer, torch.nn.Linear)


class Dense:
    """A model of which the elements marked in `masks` are trained.

    Args:
        model: The model; in float32.
        lr, eps, weight_decay, clip: As AdamW and `clip_grad_norm_` take them.
    """

    def __init__(self, model: torch.nn.Module, lr: float, eps: float, weight_decay: float, clip: float | None) -> None:
        self.model, self.clip = model, clip
        self.params = dict(model.named_parameters())
        self._make = lambda: torch.optim.AdamW(
            [
                {"params": [p for p in self.params.values() if p.ndim >= 2], "weight_decay": weight_decay},
                {"params": [p for p in self.params.values() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=lr,
            eps=eps,
        )

    def start_task(self, masks: Mapping[str, torch.Tensor]) -> None:
        """`masks`: bool in each parameter's shape, True for what is trained."""
        self.masks, self.optimizer = masks, self._make()

    def step(self, losses: Sequence[Callable[[torch.nn.Module], torch.Tensor]]) -> None:
        """One step; the gradients of the losses add up."""
        self.optimizer.zero_grad(set_to_none=False)
        for loss in losses:
            loss(self.model).backward()
        for name, parameter in self.params.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad[~self.masks[name]] = 0
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.params.values()), self.clip)
        before = {name: parameter.detach().clone() for name, parameter in self.params.items()}
        self.optimizer.step()
        with torch.no_grad():
            for name, parameter in self.params.items():
                dropped = ~self.masks[name]
                parameter[dropped] = before[name][dropped]
                for moment in ("exp_avg", "exp_avg_sq"):
                    self.optimizer.state[parameter][moment][dropped] = 0
