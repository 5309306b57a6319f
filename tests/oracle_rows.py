"""The truth about steps that update chosen rows only: one process, whole tensors, plain PyTorch.

The choices are made here too: random blocks, and rows by TF-IDF, counted in Python.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import torch


class Dense:
    """A model of which a step updates some rows.

    Args:
        model: The model, in float32, with the parameters frozen that are never trained.
        mask: What other rows do: `update`: they keep weights and moments; `gradient`: their gradient is zero.
        lr, eps, weight_decay, clip: As AdamW and `clip_grad_norm_` take them.
    """

    def __init__(
        self, model: torch.nn.Module, mask: str, lr: float, eps: float, weight_decay: float, clip: float | None
    ) -> None:
        self.model, self.mask, self.clip = model, mask, clip
        self.params = {name: each for name, each in model.named_parameters() if each.requires_grad}
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.params.values() if p.ndim >= 2], "weight_decay": weight_decay},
                {"params": [p for p in self.params.values() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=lr,
            eps=eps,
        )

    def step(
        self, losses: Sequence[Callable[[torch.nn.Module], torch.Tensor]], keep: Mapping[str, torch.Tensor]
    ) -> None:
        """One step; the gradients of the losses add up. `keep`: by name `(rows,)` bool, rows that are updated."""
        self.optimizer.zero_grad(set_to_none=False)
        for loss in losses:
            loss(self.model).backward()
        for name, parameter in self.params.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if name in keep:
                parameter.grad[~keep[name]] = 0
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.params.values()), self.clip)
        held = {name: [tensor.clone() for tensor in self.held(name)] for name in keep}
        self.optimizer.step()
        for name, before in held.items() if self.mask == "update" else ():
            for tensor, old in zip(self.held(name), before or [None] * 3, strict=True):
                tensor[~keep[name]] = 0.0 if old is None else old[~keep[name]]

    def held(self, name: str) -> list[torch.Tensor]:
        """A parameter's weight and, after the first step, both moments."""
        state = self.optimizer.state[self.params[name]]
        moments = [state[which] for which in ("exp_avg", "exp_avg_sq")] if state else []
        return [self.params[name].detach(), *(moments or [torch.zeros_like(self.params[name]) for _ in range(2)])]


def resting_blocks(names: Sequence[str], trained: int, seed: int) -> list[str]:
    """Blocks that rest if so many of them are trained, drawn from a seed."""
    drawn = random.Random(seed).sample(names, trained)
    return [name for name in names if name not in drawn]


def rows_by_tf_idf(
    used: Sequence[Sequence[int]], background: Sequence[Sequence[int]], rows: int, most: int
) -> torch.Tensor:
    """Which rows of a table have the highest TF-IDF, `(rows,)` bool; of equals the first, and only those in use.

    Args:
        used: The rows that each of the step's samples looks up.
        background: The rows that each background sample looks up.
        rows: Rows of the table.
        most: Most rows to choose.
    """
    counts = Counter(row for sample in used for row in sample)
    documents = Counter(row for sample in background for row in set(sample))
    total = sum(counts.values())

    def score(row: int) -> float:
        return counts[row] / total * math.log((len(background) + 1) / (documents[row] + 1))

    chosen = torch.zeros(rows, dtype=torch.bool)
    chosen[sorted(counts, key=lambda row: (-score(row), row))[:most]] = True
    return chosen
