"""From a recipe's `method` to objects."""

from __future__ import annotations

from collections.abc import Sequence

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
    return [_build(config) for config in configs]


def _build(config: MethodConfig) -> Method:
    match config:
        case KifConfig():  # and TaSL's, which is one with other defaults
            return Kif(config)
        case RecurrentKifConfig():
            return RecurrentKif(config)
        case MiguConfig():
            return Migu(config)
        case IncLoraConfig():
            return IncLora()
        case OLoraConfig():
            return OLora(config)
        case ReplayConfig():
            return Replay(config)
        case PerTaskConfig():
            return PerTask()
        case MultiTaskConfig():
            return MultiTask()
        case EwcConfig():
            return Ewc(config)
        case LwfConfig():
            return Lwf(config)
        case AgemConfig():
            return Agem(config)
        case SequentialConfig():
            return Sequential()
