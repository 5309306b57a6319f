"""Ranges that several components' settings share, how strictly all of them are checked, and what counts as given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False)

MOST_INT = 2**31 - 1
"""Beyond every count that makes sense, and what 32 bits hold: products of two still fit 64."""
MOST_FLOAT = 1e30
"""Beyond every factor that makes sense; sums and squares of it fit float32, or nearly."""
LEAST_DIVISOR = 1e-30
"""What is divided by must not vanish in float32."""
YEAR = 365 * 24 * 3600.0
"""Seconds: longer waits overflow the system's clocks."""

PositiveInt = Annotated[int, Field(ge=1, le=MOST_INT)]
NonNegativeInt = Annotated[int, Field(ge=0, le=MOST_INT)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0, le=MOST_FLOAT)]
Positive = Annotated[float, Field(gt=0.0, le=MOST_FLOAT)]
Divisor = Annotated[float, Field(ge=LEAST_DIVISOR, le=MOST_FLOAT)]
Seconds = Annotated[float, Field(ge=0.1, le=YEAR)]
Minutes = Annotated[float, Field(gt=0.0, le=YEAR / 60)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Percent = Annotated[float, Field(ge=0.0, le=100.0)]


@dataclass(frozen=True)
class Choices:
    """Annotation of a text whose values are known only when they are asked for."""

    describe: Callable[[], str]
    """Lists them, for messages and help."""
    meaning: Callable[[], str] | None = None
    """What each of them means, where the help is to say so."""


def is_default(component: object, name: str) -> bool:
    """Whether a setting has its default; a run's config.yaml spells every setting out."""
    return bool(getattr(component, name) == getattr(type(component), name))
