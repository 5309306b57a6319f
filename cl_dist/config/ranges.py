"""What the settings of all components share: ranges, strictness, and when a setting counts as given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import ConfigDict, Field

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False)

MOST_INT = 2**31 - 1
"""Larger than any sensible count, and still an int32, so that the product of two fits 64 bits."""
MOST_FLOAT = 1e30
"""Larger than any sensible factor, and still finite in float32."""
LEAST_DIVISOR = 1e-30
"""Smallest divisor: it must not underflow to 0 in float32."""
YEAR = 365 * 24 * 3600.0
"""In seconds. Longer waits overflow the system's clocks."""

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
    """Annotation of a string whose allowed values are known only at run time, since plugins may add some."""

    describe: Callable[[], str]
    """Lists the values, for messages and help."""
    meaning: Callable[[], str] | None = None
    """Explains each value, for the help; None: the setting's docstring is enough."""


def is_default(component: object, name: str) -> bool:
    """Whether a setting has its default value. Whether the user wrote it is unknown: config.yaml has every setting."""
    return bool(getattr(component, name) == getattr(type(component), name))
