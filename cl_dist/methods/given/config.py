"""Settings of training what a file names."""

from __future__ import annotations

from typing import ClassVar, Literal

from cl_dist.methods.config import settings
from cl_dist.methods.selective.config import SelectiveConfig


@settings
class GivenConfig(SelectiveConfig):
    """Trains the rows, columns and parameters that a file of yours names, such as the embeddings of new tokens."""

    METHOD: ClassVar[str] = "cl_dist.methods.given.method:Given"
    PATHS: ClassVar[tuple[str, ...]] = ("file",)

    name: Literal["given"]
    """Name of the method."""
    file: str
    """YAML or JSON file, from the recipe's folder: by parameter name (`*` matches any part of it) `{rows: [...]}`,
    `{columns: [...]}` or `all`. Rows and columns are numbers from 0 or ranges such as `32000-32003`."""
    rest: Literal["frozen", "trained"] = "frozen"
    """What happens to the parameters that the file does not name."""
