"""The truth about updating the elements with the largest scores: one process, whole tensors, sorting.

Written without a line of cl_dist. GMT zeroes the other gradients before the norm is taken; MoFO lets AdamW step on all
elements, and then takes the step, but not the decay, of the others back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch


def mask_of(scores: torch.Tensor, keep: float) -> torch.Tensor:
    """The share `keep` of the elements, rounded down but at least one, that is largest in magnitude; of equals, those
    that come first.
    """
    count = max(1, int(scores.numel() * keep))
    order = scores.abs().reshape(-1).sort(descending=True, stable=True).indices
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[order[:count]] = True
    return mask.view(scores.shape)


class Dense:
    """A model trained by GMT or MoFO.

    Args:
        model: The model; in float32.
        method: `gmt`, `gmt-update` (the others and their moments keep their bits) or `mofo`.
        keep: Share of the elements that a step updates.
        masked: Names of the parameters of which elements are chosen.
        lr, eps, weight_decay, clip: As AdamW and `clip_grad_norm_` take them.
    """

    def __init__(
        self, model: torch.nn.Module, method: str, keep: float, masked: Sequence[str], lr: float, eps: float,
        weight_decay: float, clip: float | None,
    ) -> None:  # fmt: skip
        self.model, self.method, self.keep, self.masked, self.clip = model, method, keep, masked, clip
        self.params = {name: each for name, each in model.named_parameters() if each.requires_grad}
        decayed = [p for n, p in self.params.items() if p.ndim >= 2]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": weight_decay},
                {"params": [p for p in self.params.values() if p.ndim < 2], "weight_decay": 0.0},
            ],
            lr=lr,
            eps=eps,
        )

    def moment(self, name: str, which: str = "exp_avg") -> torch.Tensor:
        """AdamW's moment of a parameter."""
        moment: torch.Tensor = self.optimizer.state[self.params[name]][which]
        return moment

    def step(self, losses: Sequence[Callable[[torch.nn.Module], torch.Tensor]]) -> Mapping[str, torch.Tensor]:
        """One step; the gradients of the losses add up. Returns which elements of each parameter were chosen."""
        self.optimizer.zero_grad(set_to_none=False)
        for loss in losses:
            loss(self.model).backward()
        masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.params.items()}
        for name, parameter in self.params.items():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            if name in self.masked and self.method != "mofo":
                masks[name] = mask_of(parameter.grad, self.keep)
                parameter.grad[~masks[name]] = 0
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(self.params.values()), self.clip)
        before = {name: parameter.detach().clone() for name, parameter in self.params.items()}
        state = {p: {n: v.clone() for n, v in each.items()} for p, each in self.optimizer.state.items()}
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            decay = 1 - group["lr"] * group["weight_decay"]
            for name in self.masked:
                if any(self.params[name] is parameter for parameter in group["params"]):
                    self._take_back(name, masks, before[name], state.get(self.params[name], {}), decay)
        return masks

    @torch.no_grad()
    def _take_back(
        self, name: str, masks: dict[str, torch.Tensor], before: torch.Tensor, state: dict[str, torch.Tensor],
        decay: float,
    ) -> None:  # fmt: skip
        parameter = self.params[name]
        if self.method == "mofo":
            masks[name] = mask_of(self.moment(name), self.keep)
            parameter.copy_(torch.where(masks[name], parameter, decay * before))
        if self.method == "gmt-update":
            parameter.copy_(torch.where(masks[name], parameter, before))
            for which in ("exp_avg", "exp_avg_sq"):
                moment = self.moment(name, which)
                moment.copy_(torch.where(masks[name], moment, state.get(which, torch.zeros_like(moment))))
