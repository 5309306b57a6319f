"""Settings of structured sparse fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.methods.config import settings
from cl_dist.methods.selective.config import SelectiveConfig, refuse_adapters

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
HEADS, CHANNELS = ("value", "output"), ("up", "gate", "down")


@settings
class S2ftConfig(SelectiveConfig):
    """S2FT, structured sparse fine-tuning: trains random feed-forward channels and attention heads, drawn anew for each
    task (arXiv 2412.06289).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.s2ft.method:S2ft"

    name: Literal["s2ft"]
    """Name of the method."""
    channels: Share = 0.03
    """Share of the feed-forward channels that a task trains (public scripts: --d_ratio 0.03)."""
    heads: Share = 0.0
    """Share of the attention heads that a task trains (public scripts: --v_ratio 0 --o_ratio 0). Query heads that share
    keys and values count as one."""
    matrices: tuple[Literal["value", "output", "up", "gate", "down"], ...] = ("output", "down")
    """Where a chosen channel or head is trained: rows of value, up and gate, columns of output and down. The public
    scripts train down, and public code never trains gate."""

    def check(self, recipe: Recipe) -> None:
        """Refuse adapters, and settings that train nothing."""
        super().check(recipe)
        refuse_adapters(self, recipe)
        for setting, places in (("heads", HEADS), ("channels", CHANNELS)):
            if getattr(self, setting) > 0 and not set(places) & set(self.matrices):
                raise ValueError(
                    f"method.matrices: {', '.join(self.matrices) or '[]'} trains no part of the {setting} that "
                    f"method.{setting} chooses; allowed with it: at least one of {', '.join(places)}"
                )
        if self.heads == self.channels == 0:
            raise ValueError("method.channels: 0 with method.heads: 0 trains nothing; one has to be above 0")
