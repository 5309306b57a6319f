"""A model's responses in compact form, and the divergence of another model from them: pure functions of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Responses(NamedTuple):
    """A model's distributions over the classes at a number of targets, at some temperature.

    If all classes are kept, `classes` and `rest` have no columns.
    """

    log_probs: torch.Tensor
    """`(targets, kept)` float32: log-probabilities of the most likely classes, or of all classes in order."""
    classes: torch.Tensor
    """`(targets, kept or 0)` int64 or int32: the indices of these classes."""
    rest: torch.Tensor
    """`(targets, 1 or 0)` float32: logarithm of the total probability of all other classes."""

    def cut(self, counts: Sequence[int]) -> list[Responses]:
        """Split into the responses at the first `counts[0]` targets, the next `counts[1]`, and so on.

        The pieces are copies, so that none keeps the others alive.
        """
        pieces = zip(*(tensor.split(list(counts)) for tensor in self), strict=True)
        return [Responses(*(tensor.clone() for tensor in piece)) for piece in pieces]

    def to(self, device: torch.device) -> Responses:
        """Move to `device`."""
        return Responses(*(tensor.to(device) for tensor in self))


def join(pieces: Sequence[Responses]) -> Responses:
    """Concatenate one or more pieces."""
    return Responses(*(torch.cat(tensors) for tensors in zip(*pieces, strict=True)))


def respond(logits: torch.Tensor, temperature: float, top_k: int | None) -> Responses:
    """Turn logits into responses at a temperature.

    Args:
        logits: `(targets, classes)`, any floating dtype.
        temperature: Divides the logits.
        top_k: Number of the most likely classes to keep separately; None or a larger number than there are keeps all.
    """
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_k is None or top_k >= log_probs.shape[1]:
        return Responses(log_probs, torch.empty_like(log_probs[:, :0], dtype=torch.int32), log_probs[:, :0])
    values, classes = log_probs.topk(top_k)
    return Responses(values, classes.to(torch.int32), _rest(log_probs, classes))


def divergence_sum(logits: torch.Tensor, old: Responses, temperature: float) -> torch.Tensor:
    """KL(old || new) at the temperature, summed over targets: a float32 scalar.

    If `old` keeps only some classes, all others count as one class in both distributions. The result is then at most
    the divergence over all classes.

    Args:
        logits: `(targets, classes)`, any floating dtype, from the new model.
        old: The old model's responses at the same targets and temperature.
        temperature: Divides the logits.
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
    """`(targets, 1)`: logarithm of the total probability of the classes that are not in `classes`."""
    return log_probs.scatter(1, classes, -torch.inf).logsumexp(dim=1, keepdim=True)
