"""What a model answers, kept in few numbers, and how far another one is from it: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Responses(NamedTuple):
    """A model's distributions over the classes at some targets, at a temperature.

    With all classes kept, `classes` and `rest` have no columns.
    """

    log_probs: torch.Tensor
    """`(targets, kept)` float32: of the likeliest classes, or of all, in order."""
    classes: torch.Tensor
    """`(targets, kept or 0)` int64 or int32: which classes these are."""
    rest: torch.Tensor
    """`(targets, 1 or 0)` float32: logarithm of what all other classes have together."""

    def cut(self, counts: Sequence[int]) -> list[Responses]:
        """One after the other, the responses at the first `counts[0]` targets, at the next `counts[1]`, and so on, each
        with a memory of its own.
        """
        pieces = zip(*(tensor.split(list(counts)) for tensor in self), strict=True)
        return [Responses(*(tensor.clone() for tensor in piece)) for piece in pieces]

    def to(self, device: torch.device) -> Responses:
        """The same on `device`."""
        return Responses(*(tensor.to(device) for tensor in self))


def join(pieces: Sequence[Responses]) -> Responses:
    """The responses at all targets of some pieces, of which there is at least one."""
    return Responses(*(torch.cat(tensors) for tensors in zip(*pieces, strict=True)))


def respond(logits: torch.Tensor, temperature: float, top_k: int | None) -> Responses:
    """The responses that `logits`, `(targets, classes)` of any floating dtype, say at a temperature.

    Only the `top_k` likeliest classes are told apart, where that is fewer than there are; None: all.
    """
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_k is None or top_k >= log_probs.shape[1]:
        return Responses(log_probs, torch.empty_like(log_probs[:, :0], dtype=torch.int32), log_probs[:, :0])
    values, classes = log_probs.topk(top_k)
    return Responses(values, classes.to(torch.int32), _rest(log_probs, classes))


def divergence_sum(logits: torch.Tensor, old: Responses, temperature: float) -> torch.Tensor:
    """KL(old || new), at the temperature, summed over targets: a float32 scalar.

    Where `old` tells only some classes apart, all others count as one class in both; the sum is then at most that over
    all classes.

    Args:
        logits: `(targets, classes)`, any floating dtype: what the new model says.
        old: At the same targets and the same temperature.
        temperature: What logits are divided by.
    """
    new = torch.log_softmax(logits.float() / temperature, dim=-1)
    kept = new
    if old.classes.shape[1]:
        classes = old.classes.long()
        kept = torch.cat([new.gather(1, classes), _rest(new, classes)], dim=1)
    return torch.nn.functional.kl_div(
        kept, torch.cat([old.log_probs, old.rest], dim=1), reduction="sum", log_target=True
    )


def _rest(log_probs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """`(targets, 1)`: logarithm of the probability of all but some classes of each target."""
    return log_probs.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
