"""Settings of the momentum-filtered optimiser."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from cl_dist.methods.config import settings
from cl_dist.methods.elements.config import ElementsConfig


@settings
class MofoConfig(ElementsConfig):
    """MoFO, momentum-filtered optimiser: AdamW updates only the elements with the largest momentum (arXiv 2407.20999).

    All moments advance, and all weights decay. The default of `keep` is that of the public code's examples, which
    recommend 0.05 to 0.2, and like the public code `parameters` leaves out norms and biases.
    """

    METHOD: ClassVar[str] = "cl_dist.methods.mofo.method:Mofo"

    name: Literal["mofo"]
    """Name of the method."""
    keep: Annotated[float, Field(gt=0.0, le=1.0)] = 0.15
    """Share of a parameter's elements that a step updates, rounded down, at least one."""
    parameters: Literal["all", "body", "matrices"] | tuple[str, ...] = "matrices"
    """Parameters of which elements are chosen; the others are updated as a whole. `all`; `body`: all but embedding
    tables and output head; `matrices`: all but norms and biases; or a list of patterns of parameter names, such as
    `*.mlp.*`."""
