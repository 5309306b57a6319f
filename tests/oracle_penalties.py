"""The truth that EWC, LwF and A-GEM are held against: one process, plain PyTorch, written from the formulas.

arXiv 1612.00796 and 1805.06370 (EWC), 1606.09282 (LwF), 1812.00420 (A-GEM), without a line of cl_dist. Every past
task's Fisher information and weights are kept, the old model is a copy, probabilities are written out. Slow, and easy
to believe.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

Loss = Callable[[torch.nn.Module], torch.Tensor]
Logits = Callable[[torch.nn.Module], torch.Tensor]
Tensors = dict[str, torch.Tensor]


class Dense:
    """A model with float32 masters; `model` itself may be bfloat16."""

    def __init__(self, model: torch.nn.Module, lr: float, eps: float, clip: float | None) -> None:
        self.model, self.lr, self.eps, self.clip = model, lr, eps, clip
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {n: torch.nn.Parameter(p.detach().float().clone()) for n, p in self.params.items()}
        self.masks: Tensors | None = None
        """True for the elements that are trained; None: all of them."""
        self.past: list[tuple[Tensors, Tensors]] = []
        """Fisher information and weights of every past task (EWC)."""
        self.start_task()

    def start_task(self) -> None:
        self.old = copy.deepcopy(self.model)
        self.optimizer = torch.optim.AdamW(list(self.masters.values()), lr=self.lr, eps=self.eps, weight_decay=0.0)

    def gradient(self, loss_of: Loss) -> Tensors:
        self.model.zero_grad(set_to_none=True)
        loss_of(self.model).backward()
        grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.params.items()}
        if self.masks is not None:
            grads = {n: torch.where(self.masks[n], g, 0) for n, g in grads.items()}
        return {n: g.detach().float().clone() for n, g in grads.items()}

    @contextmanager
    def at(self, weights: Tensors) -> Iterator[None]:
        """With these weights in the model, so that its gradients differ from others taken there by rounding alone."""
        try:
            for name, parameter in self.params.items():
                parameter.data.copy_(weights[name])
            yield
        finally:
            for name, master in self.masters.items():
                self.params[name].data.copy_(master.data)

    def step(self, gradient: Tensors) -> None:
        for name, master in self.masters.items():
            master.grad = gradient[name]
        if self.clip:
            torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.clip)
        self.optimizer.step()
        for name, master in self.masters.items():
            self.params[name].data.copy_(master.data)

    def with_penalty(self, gradient: Tensors, weight: float, online: float | None) -> Tensors:
        """The gradient of the loss plus that of EWC's penalties, by automatic differentiation; `online`: gamma."""
        penalty = torch.zeros((), dtype=torch.float64)
        masters = {n: m.detach().double().requires_grad_() for n, m in self.masters.items()}
        for age, (fisher, anchor) in enumerate(reversed(self.past)):
            decay = 1.0 if online is None else online**age
            anchor = anchor if online is None else self.past[-1][1]
            for name, master in masters.items():
                distance = master - anchor[name].double()
                penalty = penalty + weight / 2 * decay * (fisher[name].double() * distance**2).sum()
        if not self.past:
            return gradient
        penalty.backward()
        return {n: g + masters[n].grad.float() for n, g in gradient.items()}  # type: ignore[union-attr]

    def end_task(self, log_likelihoods: Sequence[Loss], together: int) -> None:
        """Squares of the gradients of `together` samples' log-likelihoods, in the mean over samples."""
        fisher = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        for start in range(0, len(log_likelihoods), together):
            total = {n: torch.zeros_like(m) for n, m in self.masters.items()}
            for log_likelihood in log_likelihoods[start : start + together]:
                for name, grad in self.gradient(log_likelihood).items():
                    total[name] += grad
            for name, grad in total.items():
                fisher[name] += grad**2 / len(log_likelihoods)
        self.past.append((fisher, {n: m.detach().clone() for n, m in self.masters.items()}))

    def fisher(self, online: float | None) -> Tensors:
        """The weight that pulls at each element."""
        decay = 1.0 if online is None else online
        sums: Tensors = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        for fisher, _ in self.past:
            sums = {n: decay * s + fisher[n] for n, s in sums.items()}
        return sums

    def distillation(self, logits_of: Logits, temperature: float, top_k: int | None) -> Loss:
        """A function from a model to KL(old || new), summed over the targets that `logits_of` gives logits of."""
        with torch.no_grad():
            old = torch.softmax(logits_of(self.old).double() / temperature, dim=1)
        order = old.argsort(dim=1, descending=True)
        kept = old.shape[1] if top_k is None else min(top_k, old.shape[1])

        def coarse(probabilities: torch.Tensor) -> torch.Tensor:
            """The likeliest classes one by one, the others as one."""
            ordered = probabilities.gather(1, order)
            if kept == ordered.shape[1]:
                return ordered
            return torch.cat([ordered[:, :kept], ordered[:, kept:].sum(dim=1, keepdim=True)], dim=1)

        def divergence(model: torch.nn.Module) -> torch.Tensor:
            new = torch.softmax(logits_of(model).double() / temperature, dim=1)
            p, q = coarse(old), coarse(new)
            return (p * (p / q).log()).sum()

        return divergence


def project(gradient: Tensors, reference: Tensors) -> tuple[Tensors, bool]:
    """A-GEM: the gradient without what points against the reference, and whether there was any."""
    g = torch.cat([gradient[n].double().reshape(-1) for n in gradient])
    r = torch.cat([reference[n].double().reshape(-1) for n in gradient])
    if g @ r >= 0:
        return gradient, False
    scale = float((g @ r) / (r @ r))
    return {n: gradient[n] - scale * reference[n] for n in gradient}, True
