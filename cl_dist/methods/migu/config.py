"""Settings of MIGU."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from cl_dist.config.ranges import Fraction
from cl_dist.methods.config import Role, VariedConfig, refuse_given, settings


@settings
class MiguConfig(VariedConfig):
    """MIGU, magnitude-based gradient updating: updates only the rows with the largest outputs (arXiv 2406.17245)."""

    METHOD: ClassVar[str] = "cl_dist.methods.migu.method:Migu"
    ROLES: ClassVar[Collection[Role]] = (Role.SELECTS,)
    VARIED: ClassVar[tuple[str, ...]] = ("threshold",)

    name: Literal["migu"]
    """Name of the method."""
    threshold: Fraction = 0.7
    """Quantile T of a layer's output magnitudes; rows below it get no gradient."""
    mask: Literal["gradient", "update"] = "gradient"
    """`gradient` (paper): dropped rows get a zero gradient, so momentum and weight decay still move them. `update`:
    dropped rows keep their weights and both moments bit for bit."""
    magnitude: Literal["per_token", "batch"] = "per_token"
    """`per_token` (paper): each token's output is L1-normalised before summing. `batch` (reference code): plain sum of
    absolute outputs."""
    sums: Literal["step", "task"] = "step"
    """`step` (paper, reference code): a step's mask follows that step's magnitudes. `task`: those of all steps of the
    task so far, so that it changes less from step to step and can be known before a step."""
    selection: Literal["magnitude", "random"] = "magnitude"
    """`random` keeps the same number of rows, drawn at random in each step: the paper's ablation."""
    first_task: Literal["dense", "masked"] = "dense"
    """Train the stream's first task without a mask (`dense`, as the reference code does) or with one (`masked`)."""
    layers: Literal["blocks", "all"] | tuple[str, ...] = "blocks"
    """`blocks`: mask each linear layer inside the transformer blocks; `all`: the output head too, as the reference code
    does; or a list of patterns of layer names, such as `*.mlp.*`."""
    tied_head: Literal["error", "mask"] = "error"
    """What to do about an output head that `layers` names and that shares its weight with the embedding. `error`:
    refuse it; `mask`: mask the weight's whole gradient by the head's outputs, as in the reference code."""
    mask_bias: bool = True
    """Mask a bias along with its weight's rows (reference code: false)."""
    count_padding: bool = False
    """Include padding tokens in the magnitudes, as the reference code does."""
    skip_rows: bool = True
    """Do not compute the masked rows of the weight gradients at all, which gives the same gradients in less time. Needs
    one micro-batch per step, or `mask_scope: micro_batch` or `ahead`; otherwise the reduced gradients are masked.
    false: always mask after the reduction."""
    mask_scope: Literal["step", "micro_batch", "ahead"] = "step"
    """With gradient accumulation. `step`: one mask per step from all of its micro-batches, exact. `micro_batch`: each
    micro-batch is masked by the step's magnitudes so far, an approximation that lets it skip rows. `ahead` (with
    `sums: task`): a step's mask follows the task's steps before it, so all of its micro-batches skip rows; the first
    step of a task is masked by its own magnitudes."""
    compact: Literal["auto", "off"] = "auto"
    """`auto`: the ranks send each other only the rows that a step keeps, wherever these are known in time. `off`: they
    always send whole gradients and weights. Both train the same weights."""
    untracked: Literal["error", "dense"] = "error"
    """What to do about trainable matrices inside the transformer blocks whose outputs cannot be measured. `error`:
    refuse the model and name them; `dense`: train them without a mask and log it."""

    def __post_init__(self) -> None:
        """Refuse a mask scope that needs skipping without it, and settings of a measurement that random rows ignore."""
        super().__post_init__()
        if not self.layers:
            raise ValueError("layers: the list is empty; allowed: blocks, all, or at least one pattern")
        if self.mask_scope == "micro_batch" and not self.skip_rows:
            raise ValueError("mask_scope: micro_batch masks inside the backward pass, which skip_rows: false forbids")
        if self.mask_scope == "ahead" and self.sums != "task":
            raise ValueError(
                "mask_scope: ahead takes a step's mask from the task's steps before it, which only sums: task remembers"
            )
        if self.mask_scope == "micro_batch" and self.sums == "task":
            raise ValueError(
                "mask_scope: micro_batch starts from nothing in each step; allowed with sums: task are step, ahead"
            )
        if self.selection == "random":
            refuse_given(
                self,
                "is not used: selection: random draws rows without measuring them",
                "magnitude",
                "count_padding",
                "sums",
            )

    def depends_on_split(self, accumulates: bool) -> str | None:
        """The split changes the masks of single micro-batches, and how much padding there is."""
        if self.mask_scope == "micro_batch" and accumulates:
            return "mask_scope: micro_batch"
        return "count_padding: true" if self.count_padding else None
