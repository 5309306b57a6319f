"""Settings of plain sequential fine-tuning."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from cl_dist.methods.config import MethodConfig, Role, settings


@settings
class SequentialConfig(MethodConfig):
    """Plain sequential fine-tuning (SeqFT, SeqLoRA): the lower bound."""

    METHOD: ClassVar[str] = "cl_dist.methods.sequential.method:Sequential"
    ROLES: ClassVar[Collection[Role]] = (Role.PLAIN,)

    name: Literal["sequential"] = "sequential"
    """Name of the method."""
