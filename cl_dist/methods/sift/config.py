"""Settings of sparse increment fine-tuning."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.config.ranges import PositiveInt
from cl_dist.methods.config import Need, settings
from cl_dist.methods.selective.config import SelectiveConfig


@settings
class SiftConfig(SelectiveConfig):
    """SIFT, sparse increment fine-tuning: trains the elements with the largest first gradient of a task
    (arXiv 2312.11875).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.sift.method:Sift"
    NEEDS: ClassVar[Collection[Need]] = (
        Need.START,
        Need.PROBE,
    )

    name: Literal["sift"]
    """Name of the method."""
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.05
    """Share of each weight's elements that a task trains, rounded down, and one more, as in the public code. Its
    scripts have 0.05 for instruction tuning of LLaMA and 0.008 for GLUE."""
    layers: Literal["blocks", "all"] | tuple[str, ...] = "blocks"
    """`blocks`: elements of each linear layer inside the transformer blocks, as in the public code; `all`: of the
    output head too; or a list of patterns of layer names, such as `*.mlp.*`."""
    rest: Literal["frozen", "trained"] = "frozen"
    """What happens to the parameters of other layers and to biases. The public code freezes them, except for parameters
    that its `exception` names, such as a classifier's head."""
    samples: PositiveInt | None = None
    """How many of the task's samples, drawn with the seed, the first gradient is taken on; at most a global batch.
    null: a global batch. The public code takes the first micro-batch."""

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        if not self.layers:
            raise ValueError("layers: the list is empty; allowed: blocks, all, or at least one pattern")
