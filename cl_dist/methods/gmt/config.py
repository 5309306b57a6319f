"""Settings of gradient-mask tuning."""

from __future__ import annotations

from typing import ClassVar, Literal

from cl_dist.methods.config import settings
from cl_dist.methods.elements.config import ElementsConfig


@settings
class GmtConfig(ElementsConfig):
    """GMT, gradient-mask tuning: in every step only the elements with the largest gradients get one (arXiv 2406.15330).

    The default of `keep` is that of the code in gucci-j/ssu.
    """

    METHOD: ClassVar[str] = "cl_dist.methods.gmt.method:Gmt"

    name: Literal["gmt"]
    """Name of the method."""
    mask: Literal["gradient", "update"] = "gradient"
    """`gradient` (paper, public code): the other elements get a zero gradient, so momentum and weight decay still move
    them. `update`: they keep their weights and both moments bit for bit."""
