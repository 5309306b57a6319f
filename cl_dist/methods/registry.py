"""From a recipe's `method` to objects."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cl_dist.config.methods import (
    AgemConfig,
    EwcConfig,
    IncLoraConfig,
    KifConfig,
    LwfConfig,
    MethodConfig,
    MiguConfig,
    MultiTaskConfig,
    OLoraConfig,
    PerTaskConfig,
    RecurrentKifConfig,
    ReplayConfig,
    SequentialConfig,
    TaslConfig,
)
from cl_dist.methods.agem import Agem
from cl_dist.methods.base import Method
from cl_dist.methods.bounds import MultiTask, PerTask
from cl_dist.methods.ewc import Ewc
from cl_dist.methods.inclora import IncLora, OLora
from cl_dist.methods.kif import Kif, RecurrentKif
from cl_dist.methods.lwf import Lwf
from cl_dist.methods.migu import Migu
from cl_dist.methods.replay import Replay
from cl_dist.methods.sequential import Sequential


def build_methods(configs: Sequence[MethodConfig]) -> list[Method]:
    """Return one object per entry, in the order in which they compose."""
    return [_FACTORIES[type(config)](config) for config in configs]


_FACTORIES: Mapping[type, Callable[[Any], Method]] = {
    SequentialConfig: lambda _: Sequential(),
    IncLoraConfig: lambda _: IncLora(),
    OLoraConfig: OLora,
    ReplayConfig: Replay,
    EwcConfig: Ewc,
    LwfConfig: Lwf,
    AgemConfig: Agem,
    PerTaskConfig: lambda _: PerTask(),
    MultiTaskConfig: lambda _: MultiTask(),
    MiguConfig: Migu,
    KifConfig: Kif,
    TaslConfig: Kif,
    RecurrentKifConfig: RecurrentKif,
}
"""By the configuration's class; TaSL is KIF with other defaults."""
