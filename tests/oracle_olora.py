"""The truth that IncLoRA and O-LoRA are held against: one process, plain PyTorch, the penalty in the loss.

Written from the formulas (arXiv 2310.14152, and the norms of its code) without a line of cl_dist or peft: hooks add the
adapters' outputs to those of the linear layers, autograd finds the penalty's gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

Pair = tuple[torch.nn.Parameter, torch.nn.Parameter]


class Dense:
    """A frozen model with a list of (A, B) per linear layer, of which the last pair is trained."""

    def __init__(
        self, model: torch.nn.Module, layers: Sequence[str], scale: float, lambda1: float, lambda2: float,
        lr: float, eps: float, clip: float | None,
    ) -> None:  # fmt: skip
        self.model, self.lambda1, self.lambda2 = model.requires_grad_(False), lambda1, lambda2
        self.lr, self.eps, self.clip = lr, eps, clip
        self.pairs: dict[str, list[Pair]] = {layer: [] for layer in layers}
        for layer in layers:
            model.get_submodule(layer).register_forward_hook(self._adding(layer, scale))

    def _adding(self, layer: str, scale: float) -> Callable[..., torch.Tensor]:
        def add(_module: object, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            return output + sum(scale * inputs[0] @ a.T @ b.T for a, b in self.pairs[layer])

        return add

    def start_task(self, values: Mapping[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Freeze what is there and train new matrices that begin with `values`."""
        for layer, pairs in self.pairs.items():
            for matrix in (matrix for pair in pairs for matrix in pair):
                matrix.requires_grad_(False)
            a, b = values[layer]
            pairs.append((torch.nn.Parameter(a.clone()), torch.nn.Parameter(b.clone())))
        self.optimizer = torch.optim.AdamW(self.newest(), lr=self.lr, eps=self.eps, weight_decay=0.0)

    def newest(self) -> list[torch.nn.Parameter]:
        """All matrices that are trained."""
        return [matrix for pairs in self.pairs.values() for matrix in pairs[-1]]

    def penalty(self) -> torch.Tensor:
        """lambda1 sum |A_old A_new^T| + lambda2 sum ||W||."""
        overlap = sum((a @ pairs[-1][0].T).abs().sum() for pairs in self.pairs.values() for a, _ in pairs[:-1])
        norms = sum(torch.norm(matrix, p=2) for matrix in self.newest())
        return self.lambda1 * overlap + self.lambda2 * norms

    def step(self, losses: Sequence[Callable[[torch.nn.Module], torch.Tensor]]) -> None:
        """One optimiser step on the sum of the losses and the penalty."""
        self.optimizer.zero_grad()
        (sum(loss(self.model) for loss in losses) + self.penalty()).backward()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.newest(), self.clip)
        self.optimizer.step()
