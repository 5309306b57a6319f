"""How large the inputs of linear layers are on some samples: the same to the last bit on any number of ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from cl_dist.config.words import listed
from cl_dist.errors import BadInput

if TYPE_CHECKING:
    from cl_dist.methods.protocol import Probe
    from cl_dist.tasks.types import Encoded

SHOWN = 6
"""Most names in a message."""


def mean_square_inputs(
    layers: Mapping[str, nn.Module], samples: Sequence[Encoded], probe: Probe
) -> dict[str, torch.Tensor]:
    """The mean square of each input of each layer: over the tokens of a sample, then over the samples (collective).

    Squares are taken and added up in float64. Every sample runs by itself, and the samples' means are added in the
    order of the samples, whichever rank has measured them.

    Args:
        layers: The layers, by the names of the result.
        samples: At least one, the same on all ranks.
        probe: Runs them.

    Returns:
        By name `(inputs,)` float64, the same on all ranks.

    Raises:
        BadInput: A layer has not run.
    """
    sums: dict[str, torch.Tensor] = {}
    tokens: Counter[str] = Counter()

    def watch(name: str) -> Any:
        def see(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
            squares = given[0].detach().reshape(-1, given[0].shape[-1]).double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares
            tokens[name] += given[0].shape[:-1].numel()

        return layers[name].register_forward_pre_hook(see)

    total = torch.zeros(())

    def take(count: int) -> None:
        nonlocal total
        _refuse_idle([name for name in layers if name not in sums])
        own = torch.cat([sums.pop(name) / tokens.pop(name) for name in layers])
        everyone = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(everyone, own)
        for each in everyone[:count]:
            total = total.to(each.device) + each

    hooks = [watch(name) for name in layers]
    try:
        probe.each(samples, take)
    finally:
        for hook in hooks:
            hook.remove()
    sizes = [_inputs(layer) for layer in layers.values()]
    return dict(zip(layers, (total / len(samples)).split(sizes), strict=True))


def _inputs(layer: nn.Module) -> int:
    """Inputs of an `nn.Linear` or a Conv1D."""
    return int(layer.in_features) if isinstance(layer, nn.Linear) else int(layer.nx)  # type: ignore[arg-type]


def _refuse_idle(idle: Sequence[str]) -> None:
    if idle:
        raise BadInput(
            f"method.calibration: these layers do not run, so that their inputs cannot be measured: "
            f"{listed(idle, SHOWN)}; allowed for this model are methods without a calibration"
        )
