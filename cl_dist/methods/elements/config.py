"""Settings that all methods share which choose elements in every step."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.methods.config import Exclusion, Role, VariedConfig, settings


@settings
class ElementsConfig(VariedConfig):
    """In every step only the elements with the largest scores are updated, the same on any number of ranks."""

    ROLES: ClassVar[Collection[Role]] = (Role.SELECTS,)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        Exclusion(Role.SELECTS, "each of them chooses which part of the weights is trained; give one of them"),
    )
    VARIED: ClassVar[tuple[str, ...]] = ("keep",)

    name: Literal["gmt", "mofo"]
    """Name of the method."""
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """Share of a parameter's elements that a step updates, rounded down, at least one."""
    parameters: Literal["all", "body", "matrices"] | tuple[str, ...] = "all"
    """Parameters of which elements are chosen; the others are updated as a whole. `all`; `body`: all but embedding
    tables and output head; `matrices`: all but norms and biases; or a list of patterns of parameter names, such as
    `*.mlp.*`."""

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        super().__post_init__()
        if not self.parameters:
            raise ValueError("parameters: the list is empty; allowed: all, body, matrices, or at least one pattern")
