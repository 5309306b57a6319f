"""Whole weights out of a sharded model, one parameter at a time."""

from __future__ import annotations

import torch

from cl_dist.heartbeat import beat


def gather_state_dict(model: torch.nn.Module, trainable_only: bool = False) -> dict[str, torch.Tensor]:
    """Collect the model's weights in CPU memory of rank 0 (collective; the other ranks get an empty dict).

    Args:
        model: Any module, its parameters sharded by ZeRO-3 or not.
        trainable_only: Leave frozen parameters and buffers out (the base model under adapters).

    Returns:
        Copies by the names of `model.state_dict()`, in the model's dtype. A tied weight appears under its first name.
    """
    from deepspeed.runtime.zero import GatheredParameters

    first = torch.distributed.get_rank() == 0 if torch.distributed.is_initialized() else True
    weights: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        if trainable_only and not param.requires_grad:
            continue
        with GatheredParameters([param]):
            if first:
                weights[name] = param.detach().to("cpu", copy=True)
        beat()
    if first and not trainable_only:
        weights.update(_persistent_buffers(model))
    return weights


def _persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    saved = model.state_dict().keys()
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers() if name in saved}
