"""The truth that distributed training is held against: MIGU on one process, in plain PyTorch.

Written from the formulas (arXiv 2406.17245) without a line of cl_dist: hooks keep whole outputs, `torch.quantile` finds
the threshold, `.grad` is masked in place. Slow, and easy to believe.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

Forwards = Sequence[tuple[Callable[[torch.nn.Module], torch.Tensor], dict[str, torch.Tensor]]]


@dataclass
class Settings:
    """What one dense run does."""

    threshold: float = 0.7
    mask: str = "gradient"
    magnitude: str = "per_token"
    lr: float = 1e-2
    eps: float = 1e-2
    weight_decay: float = 0.0
    clip: float | None = None
    masked: bool = True
    bias: bool = True
    sums: str = "step"
    """`task`: magnitudes add up over the steps of a task."""
    ahead: bool = False
    """A step is masked by the steps before it, the first one by its own magnitudes."""
    rounds: int = 1
    """Parts of a step that are masked one after the other, each by the magnitudes so far."""


@dataclass
class Dense:
    """A model with float32 masters; `model` itself may be bfloat16."""

    model: torch.nn.Module
    layers: dict[str, torch.nn.Linear]
    settings: Settings
    masters: dict[str, torch.nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        trainable = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.masters = {n: torch.nn.Parameter(p.detach().float().clone()) for n, p in trainable.items()}
        decay = [p for p in self.masters.values() if p.ndim >= 2]
        rest = [p for p in self.masters.values() if p.ndim < 2]
        s = self.settings
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": s.weight_decay}, {"params": rest, "weight_decay": 0.0}],
            lr=s.lr,
            eps=s.eps,
        )
        self.magnitudes: dict[str, torch.Tensor] = {}
        self.keep: dict[str, torch.Tensor] = {}
        self.following: dict[str, torch.Tensor] = {}

    def step(self, forwards: Forwards, chosen: dict[str, torch.Tensor] | None = None) -> None:
        """One step over `forwards`: (function from model to a loss, real-token masks). Gradients of the losses add up.

        `chosen` puts other masks in the place of the ones computed here (which are kept in `keep` all the same).
        """
        if self.settings.rounds > 1:
            return self._step_in_rounds(forwards)
        known = self.following if self.settings.ahead else {}
        self._backward(forwards, self.magnitudes if self.settings.sums == "task" else None)
        self.following = self.keep
        self.keep = known or self.keep
        self._update(self.keep if chosen is None else chosen)

    def _step_in_rounds(self, forwards: Forwards) -> None:
        """Mask the gradient of every round before it is added to that of the rounds before."""
        params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        total = {n: torch.zeros_like(p) for n, p in params.items()}
        any_round = {n: torch.zeros(layer.out_features, dtype=torch.bool) for n, layer in self.layers.items()}
        self.magnitudes = {}
        size = len(forwards) // self.settings.rounds
        for first in range(0, len(forwards), size):
            self._backward(forwards[first : first + size], self.magnitudes)
            for name, keep in self.keep.items():
                any_round[name] |= keep
                for tensor in ("weight", "bias"):
                    if f"{name}.{tensor}" in params:
                        params[f"{name}.{tensor}"].grad[~keep] = 0
            for name, param in params.items():
                if param.grad is not None:
                    total[name] += param.grad
            self.model.zero_grad(set_to_none=True)
        for name, param in params.items():
            param.grad = total[name]
        self.keep = any_round
        self._update(any_round)

    def _backward(self, forwards: Forwards, before: dict[str, torch.Tensor] | None = None) -> None:
        """Gradients and magnitudes of `forwards`, the latter on top of those `before`; masks from the magnitudes."""
        sums: dict[str, torch.Tensor] = dict(before or {})
        for loss_of, token_masks in forwards:
            outputs: dict[str, torch.Tensor] = {}
            handles = [m.register_forward_hook(_keeper(outputs, n)) for n, m in self.layers.items()]
            loss = loss_of(self.model)
            for handle in handles:
                handle.remove()
            loss.backward()
            for name, output in outputs.items():
                sums[name] = sums.get(name, 0) + self._magnitude(output, token_masks[_kind(name, token_masks)])
        self.magnitudes = sums
        self.keep = {name: m >= torch.quantile(m, self.settings.threshold) for name, m in sums.items()}

    def _magnitude(self, output: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        y = output.double()[tokens].abs()
        if self.settings.magnitude == "per_token":
            norm = y.sum(-1, keepdim=True)
            y = torch.where(norm > 0, y / norm, 0.0)
        return y.sum(0)

    def _update(self, keep: dict[str, torch.Tensor]) -> None:
        params = dict(self.model.named_parameters())
        names = {id(p): n for n, p in params.items()}  # a tied head's weight has the embedding's name
        rows = {}
        if self.settings.masked:
            rows = {names[id(self.layers[n].weight)]: k for n, k in keep.items()}
            if self.settings.bias:
                rows |= {f"{n}.bias": k for n, k in keep.items() if f"{n}.bias" in self.masters}
        for name, master in self.masters.items():
            grad = params[name].grad
            master.grad = torch.zeros_like(master) if grad is None else grad.float()
            if name in rows:
                master.grad[~rows[name]] = 0
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.settings.clip)
        before = self._snapshot(rows) if self.settings.mask == "update" else {}
        self.optimizer.step()
        for name, tensors in before.items():
            for now, old in zip(self._state(name), tensors, strict=True):
                now.data[~rows[name]] = old[~rows[name]]
        self.model.zero_grad(set_to_none=True)
        for name, master in self.masters.items():
            params[name].data.copy_(master.data)

    def _state(self, name: str) -> list[torch.Tensor]:
        master = self.masters[name]
        state = self.optimizer.state.get(master, {})
        return [master] + [state[k] for k in ("exp_avg", "exp_avg_sq") if k in state]

    def _snapshot(self, rows: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
        for name in rows:
            state = self.optimizer.state[self.masters[name]]
            if not state:
                zeros = torch.zeros_like(self.masters[name])
                state.update(step=torch.tensor(0.0), exp_avg=zeros.detach(), exp_avg_sq=zeros.detach().clone())
        return {name: [t.detach().clone() for t in self._state(name)] for name in rows}


def _keeper(outputs: dict[str, torch.Tensor], name: str) -> Callable[..., None]:
    def keep(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> None:
        outputs[name] = output.detach()

    return keep


def _kind(name: str, kinds: Collection[str]) -> str:
    """T5: encoder layers, and the decoder's cross-attention keys and values, run over source tokens; the decoder and
    the head over target tokens.
    """
    if "target" not in kinds or ("decoder." not in name and name != "lm_head"):
        return "input"
    return "input" if any(part in name for part in ("EncDecAttention.k", "EncDecAttention.v")) else "target"
