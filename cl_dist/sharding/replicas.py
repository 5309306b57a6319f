"""Checksums of what every rank holds whole and must hold alike."""

from __future__ import annotations

import torch

_CHUNK = 1 << 22
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def replica_checksums(model: torch.nn.Module) -> tuple[list[str], torch.Tensor]:
    """Names of the parameters that every rank holds whole, and a checksum of the bits of each.

    Stages 0 to 2: all parameters. Stage 3: those that DeepSpeed never shards (`stage3_param_persistence_threshold`),
    which may be none; the others exist once only.

    Args:
        model: The module inside the engine, between two steps.

    Returns:
        Names, and `(names,)` int64: equal weights have equal checksums, and a change of one element changes its.
    """
    replicas = {name: param for name, param in model.named_parameters() if getattr(param, "ds_persist", True)}
    sums = [_checksum(param.detach().reshape(-1)) for param in replicas.values()]
    device = next(model.parameters()).device
    return list(replicas), torch.stack(sums) if sums else torch.zeros(0, dtype=torch.int64, device=device)


def _checksum(flat: torch.Tensor) -> torch.Tensor:
    """Int64 scalar: the sum of the elements' bits, each times an odd number of its position, modulo 2^64.

    An odd factor has an inverse modulo 2^64, so no change of one element can vanish.
    """
    bits = flat.contiguous().view(_INTEGERS[flat.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for start in range(0, bits.numel(), _CHUNK):
        piece = bits[start : start + _CHUNK].long()
        factors = torch.arange(start, start + piece.numel(), device=flat.device).mul_(2).add_(1)
        total += (piece * factors).sum()
    return total
