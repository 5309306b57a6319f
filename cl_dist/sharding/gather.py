"""Whole weights out of a sharded model, one parameter at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch

from cl_dist.heartbeat import beat


def gather_state_dict(
    model: torch.nn.Module, wanted: Callable[[str, torch.nn.Parameter], bool] | None = None
) -> dict[str, torch.Tensor]:
    """Collect the model's weights in CPU memory of rank 0 (collective; the other ranks get an empty dict).

    Args:
        model: Any module, its parameters sharded by ZeRO-3 or not.
        wanted: Whether a parameter, given with its name, is collected; buffers are left out then. None: everything.

    Returns:
        Copies by the names of `model.state_dict()`, in the model's dtype. A tied weight appears under its first name.
    """
    from deepspeed.runtime.zero import GatheredParameters

    first = torch.distributed.get_rank() == 0 if torch.distributed.is_initialized() else True
    weights: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        if wanted is not None and not wanted(name, param):
            continue
        with GatheredParameters([param]):
            if first:
                weights[name] = param.detach().to("cpu", copy=True)
        beat()
    if first and wanted is None:
        weights.update(_persistent_buffers(model))
    return weights


def whole_parameters(model: torch.nn.Module, names: Iterable[str]) -> Iterator[torch.Tensor]:
    """Each named parameter, whole on every rank while it is looked at (collective: all ranks go through all of them).

    The tensors are views, in the model's dtype; what is kept must be copied.
    """
    from deepspeed.runtime.zero import GatheredParameters

    for name in names:
        param = model.get_parameter(name)
        with GatheredParameters([param]):
            yield param.detach()


def _persistent_buffers(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    saved = model.state_dict().keys()
    return {name: buffer.detach().to("cpu", copy=True) for name, buffer in model.named_buffers() if name in saved}
