"""Settings of sparse memory fine-tuning."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

from cl_dist.config.ranges import PositiveInt
from cl_dist.methods.config import Exclusion, MethodConfig, Need, Role, settings
from cl_dist.methods.selective.config import refuse_adapters

if TYPE_CHECKING:
    from cl_dist.config.schema import Recipe


@settings
class SparseMemoryConfig(MethodConfig):
    """Sparse memory fine-tuning: in every step trains the embedding rows that its batch uses and other text rarely does
    (arXiv 2510.15103).
    """

    METHOD: ClassVar[str] = "cl_dist.methods.sparse_memory.method:SparseMemory"
    PATHS: ClassVar[tuple[str, ...]] = ("background",)
    DATA: ClassVar[tuple[str, ...]] = ("background",)
    NEEDS: ClassVar[Collection[Need]] = (Need.PROBE,)
    ROLES: ClassVar[Collection[Role]] = (Role.SELECTS,)
    EXCLUDES: ClassVar[Sequence[Exclusion]] = (
        Exclusion(Role.SELECTS, "each of them chooses which part of the weights is trained; give one of them"),
        Exclusion(Role.FUSES, "fusion needs the gradient of every weight, and here what is not trained has none"),
        Exclusion(Role.ANCHORS, "ewc needs the gradient of every weight, and here what is not trained has none"),
        Exclusion(Role.GROWS, "adapters leave the embeddings as they are, and nothing else is chosen here"),
    )

    name: Literal["sparse_memory"]
    """Name of the method."""
    background: str
    """File or folder with samples of what the model should keep, from the recipe's folder; read like a task's `path`
    with format auto. The method takes text of the pre-training data."""
    samples: PositiveInt = 1000
    """Number of background samples (1,000 batches in descriptions of the paper), at even distances; all of them if
    there are fewer."""
    rows: PositiveInt = 500
    """Most rows of a table that a step trains: those with the highest TF-IDF (t = 500 memory slots in descriptions
    of the paper)."""
    parameters: Literal["input"] | tuple[str, ...] = "input"
    """The embedding tables. `input`: that of the input tokens; or a list of patterns of parameter names, such as
    `*.embed_tokens_per_layer.weight`."""
    rest: Literal["frozen", "trained"] = "frozen"
    """What happens to all other parameters. The paper trains nothing else."""
    mask: Literal["gradient", "update"] = "update"
    """`update`: the other rows keep their weights and both moments bit for bit, as with the paper's SGD. `gradient`:
    they get a zero gradient, so AdamW's momentum and weight decay still move them."""

    def __post_init__(self) -> None:
        """Refuse an empty list."""
        if not self.parameters:
            raise ValueError("parameters: the list is empty; allowed: input, or at least one pattern")

    def check(self, recipe: Recipe) -> None:
        """Refuse adapters, which are no rows of a table."""
        refuse_adapters(self, recipe)
