"""The truth that KIF and its relatives are held against: one process, plain PyTorch, written from the formulas.

arXiv 2408.05200 (KIF), 2408.09857 (TaSL) and 2502.17510 (Recurrent-KIF), without a line of cl_dist. Units are written
out one by one as lists of boxes, the outer product of a rank unit is built, the penalty is a part of the loss. Slow,
and easy to believe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Box = tuple[str, tuple[tuple[int, int], ...]]
"""A parameter and one (start, stop) per dimension."""
Unit = frozenset[Box]


@dataclass
class Settings:
    """What one dense run does."""

    units: str
    order: str
    fusion: str
    lr: float = 1e-2
    eps: float = 1e-2
    clip: float | None = None
    beta1: float = 0.85
    beta2: float = 0.85
    tau: float = 0.25
    threshold: float = 20.0
    weight_new: float = 0.3
    weight_old: float = 0.7
    weight_neither: float = 0.5
    accumulate_new: float = 0.3
    orthogonal: float = 0.0
    keep_optimizer: bool = False
    importance_at: str = "before_update"
    importance_from_step: int = 1
    masks: str = "units"
    empty_inner_scores: bool = False
    empty_outer_scores: bool = False


class Dense:
    """A model with float32 masters; `model` itself may be bfloat16."""

    def __init__(self, model: torch.nn.Module, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.masters = {n: torch.nn.Parameter(p.detach().float().clone()) for n, p in self.params.items()}
        self.units = units_of({n: tuple(p.shape) for n, p in self.params.items()}, settings.units)
        self.fused: dict[str, torch.Tensor] = {}
        self.accumulated: dict[Unit, float] = {}
        self.unfused: dict[str, torch.Tensor] = {}
        self.scores: dict[Unit, float] = {}
        self.shares: dict[Unit, float] = {}
        self.optimizer: torch.optim.Optimizer | None = None

    def start_task(self) -> None:
        if self.optimizer is None or not self.settings.keep_optimizer:
            self.optimizer = torch.optim.AdamW(
                list(self.masters.values()), lr=self.settings.lr, eps=self.settings.eps, weight_decay=0.0
            )
        self.importance = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.deviation = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.seen = 0

    def step(self, losses: Sequence[Callable[[torch.nn.Module], torch.Tensor]]) -> None:
        """One step; the gradients of the losses, and of the penalty, add up."""
        for loss_of in losses:
            loss_of(self.model).backward()
        for name, master in self.masters.items():
            grad = self.params[name].grad
            master.grad = torch.zeros_like(master) if grad is None else grad.float()
        if self.settings.orthogonal:
            self._penalty().backward()
        if self.settings.importance_at == "before_update":
            self._track()
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(list(self.masters.values()), self.settings.clip)
        assert self.optimizer is not None
        self.optimizer.step()
        if self.settings.importance_at == "after_update":
            self._track()
        self.model.zero_grad(set_to_none=True)
        self._publish()

    def measure(self, weights: dict[str, torch.Tensor], gradients: dict[str, torch.Tensor]) -> None:
        """Take a step's importance from these numbers in place of own ones, which differ by the rounding of sums."""
        for name, master in self.masters.items():
            master.data.copy_(weights[name])
            master.grad = gradients[name]
        self._track()

    def _penalty(self) -> torch.Tensor:
        norms = []
        for name, matrix in self.masters.items():
            if "lora_A" in name:
                norms.append(torch.norm(matrix @ matrix.T - torch.eye(matrix.shape[0])))
            elif "lora_B" in name:
                norms.append(torch.norm(matrix.T @ matrix - torch.eye(matrix.shape[1])))
        return self.settings.orthogonal * torch.stack(norms).mean()

    @torch.no_grad()
    def _track(self) -> None:
        s = self.settings
        self.seen += 1
        if self.seen < s.importance_from_step:
            return
        for name, w in self.masters.items():
            assert w.grad is not None
            wg = w * w.grad
            now = {"first": wg.abs(), "second": (wg**2).abs(), "mixed": (wg - 0.5 * wg**2).abs()}[s.order]
            self.importance[name] = s.beta1 * self.importance[name] + (1 - s.beta1) * now
            gap = (now - self.importance[name]).abs()
            self.deviation[name] = s.beta2 * self.deviation[name] + (1 - s.beta2) * gap

    @torch.no_grad()
    def end_task(self) -> None:
        """Score, fuse (but after the first task), accumulate."""
        self.unfused = {n: m.detach().clone() for n, m in self.masters.items()}
        self.scores = {unit: self._score(unit) for unit in self.units}
        now = normalised(self.scores)
        first = not self.accumulated
        self.shares = dict.fromkeys(self.units, 1.0) if first else self._shares(now, self.accumulated)
        if not first:
            self._fuse()
        new = self.settings.accumulate_new
        added = {u: new * now[u] + (1 - new) * self.accumulated[u] for u in self.units} if not first else now
        self.accumulated = normalised(added)
        self.fused = {n: m.detach().clone() for n, m in self.masters.items()}
        self._publish()

    def _score(self, unit: Unit) -> float:
        boxes = [(self.importance[n].double() * self.deviation[n].double())[_index(box)] for n, box in unit]
        if len(boxes) == 1:
            return float(boxes[0].mean())
        return float(torch.outer(boxes[0].reshape(-1), boxes[1].reshape(-1)).mean())

    def _shares(self, now: dict[Unit, float], past: dict[Unit, float]) -> dict[Unit, float]:
        s = self.settings
        if s.fusion == "adaptive":
            e = {u: (math.exp(now[u] / s.tau), math.exp(past[u] / s.tau)) for u in self.units}
            return {u: new / (new + old) for u, (new, old) in e.items()}
        cut_now, cut_past = (_percentile(list(x.values()), 100 - s.threshold) for x in (now, past))
        table = {(True, True): s.weight_new, (True, False): 1.0, (False, True): 0.0, (False, False): s.weight_neither}
        return {u: table[now[u] > cut_now, past[u] > cut_past] for u in self.units}

    def _fuse(self) -> None:
        for unit in self.units:
            share = self.shares[unit]
            for name, box in unit:
                new, old = self.unfused[name][_index(box)], self.fused[name][_index(box)]
                self.masters[name][_index(box)] = share * new + (1 - share) * old

    def _publish(self) -> None:
        for name, master in self.masters.items():
            self.params[name].data.copy_(master.data)


class DenseRecurrent(Dense):
    """Recurrent-KIF: `start_cycle`, steps, `turn`, steps on past samples, `end_cycle`, and again."""

    def start_task(self) -> None:
        super().start_task()
        self.past_importance = {n: torch.zeros_like(m) for n, m in self.masters.items()}
        self.past_deviation = {n: torch.zeros_like(m) for n, m in self.masters.items()}

    def start_cycle(self) -> None:
        self.start = {n: m.detach().clone() for n, m in self.masters.items()}

    def turn(self) -> None:
        self.inner_end = {n: m.detach().clone() for n, m in self.masters.items()}

    def past_step(self, losses: Sequence[Callable[[torch.nn.Module], torch.Tensor]]) -> None:
        """One step whose importance is that to the past."""
        self.swap()
        self.step(losses)
        self.swap()

    @torch.no_grad()
    def end_cycle(self) -> None:
        """Score both kinds of steps and fuse the two changes."""
        s = self.settings
        self.scores = {unit: self._score(unit) for unit in self.units}
        self.swap()
        self.past_scores = {unit: self._score(unit) for unit in self.units}
        self.swap()
        table = {
            (True, True): (s.weight_new, s.weight_old),
            (True, False): (1.0, 0.0),
            (False, True): (0.0, 1.0),
            (False, False): (s.weight_neither, 1 - s.weight_neither),
        }
        if s.masks == "elements":
            self._fuse_elements(table)
        else:
            self._fuse_units(table)
        self._publish()
        for tensor in (*self.importance.values(), *self.deviation.values()) if s.empty_inner_scores else ():
            tensor.zero_()
        past = (*self.past_importance.values(), *self.past_deviation.values())
        for tensor in past if s.empty_outer_scores else ():
            tensor.zero_()

    def _fuse_units(self, table: dict[tuple[bool, bool], tuple[float, float]]) -> None:
        s = self.settings
        cut, past_cut = (_percentile(list(x.values()), 100 - s.threshold) for x in (self.scores, self.past_scores))
        self.pairs = {u: table[self.scores[u] > cut, self.past_scores[u] > past_cut] for u in self.units}
        for unit, (m, n) in self.pairs.items():
            for name, box in unit:
                at = _index(box)
                start, turned, end = self.start[name][at], self.inner_end[name][at], self.masters[name][at]
                self.masters[name][at] = start + m * (turned - start) + n * (end - turned)

    def _fuse_elements(self, table: dict[tuple[bool, bool], tuple[float, float]]) -> None:
        """Every element by itself, above or below one quantile of all elements' scores; a unit's pair is the mean."""
        masks = []
        for importance, deviation in (
            (self.importance, self.deviation),
            (self.past_importance, self.past_deviation),
        ):
            scores = {n: importance[n].double() * deviation[n].double() for n in importance}
            every = torch.cat([each.reshape(-1) for each in scores.values()])
            cut = torch.quantile(every, 1 - self.settings.threshold / 100)
            masks.append({n: each > cut for n, each in scores.items()})
        shares = {}
        for name, master in self.masters.items():
            now, past = (mask[name] for mask in masks)
            m, n = (torch.zeros(master.shape, dtype=torch.float64) for _ in range(2))
            for key, (new, old) in table.items():
                at = (now == key[0]) & (past == key[1])
                m[at], n[at] = new, old
            shares[name] = (m, n)
            start, turned, end = self.start[name], self.inner_end[name], master.data
            master.data.copy_(start + m.float() * (turned - start) + n.float() * (end - turned))

        def mean(unit: Unit, which: int) -> float:
            return float(
                torch.cat([shares[name][which][_index(box)].double().reshape(-1) for name, box in unit]).mean()
            )

        self.pairs = {unit: (mean(unit, 0), mean(unit, 1)) for unit in self.units}

    def swap(self) -> None:
        """Measure the importance to the past from here on, or no longer."""
        self.importance, self.past_importance = self.past_importance, self.importance
        self.deviation, self.past_deviation = self.past_deviation, self.deviation


def units_of(shapes: dict[str, tuple[int, ...]], kind: str) -> list[Unit]:
    """Every unit, written out."""
    units: list[Unit] = []
    for name, shape in shapes.items():
        whole = tuple((0, size) for size in shape)
        if kind == "row" and len(shape) > 1:
            units += [frozenset({(name, ((i, i + 1), *whole[1:]))}) for i in range(shape[0])]
        elif kind == "rank" and "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            for j in range(shape[0]):
                row, column = (name, ((j, j + 1), whole[1])), (b, ((0, shapes[b][0]), (j, j + 1)))
                units.append(frozenset({row, column}))
        elif kind != "rank" or "lora_B" not in name:
            units.append(frozenset({(name, whole)}))
    return units


def normalised(scores: dict[Unit, float]) -> dict[Unit, float]:
    """Min-max over all units; zeros where all are equal."""
    low, high = min(scores.values()), max(scores.values())
    return {u: 0.0 if high == low else (value - low) / (high - low) for u, value in scores.items()}


def _percentile(values: list[float], percent: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), percent / 100))


def _index(box: tuple[tuple[int, int], ...]) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)
