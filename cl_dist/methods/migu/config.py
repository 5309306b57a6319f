"""Settings of MIGU."""

from __future__ import annotations

from typing import ClassVar, Literal

from cl_dist.config.ranges import Fraction
from cl_dist.methods.config import VariedConfig, refuse_given, settings


@settings
class MiguConfig(VariedConfig):
    """MIGU, magnitude-based gradient updating (arXiv 2406.17245)."""

    METHOD: ClassVar[str] = "cl_dist.methods.migu.method:Migu"
    VARIED: ClassVar[tuple[str, ...]] = ("threshold",)

    name: Literal["migu"]
    """Name of the method."""
    threshold: Fraction = 0.7
    """Quantile T of a layer's output magnitudes below which a row gets no gradient."""
    mask: Literal["gradient", "update"] = "gradient"
    """`gradient` (paper): rows not kept get a zero gradient, so momentum and weight decay still move them. `update`:
    rows not kept keep their weights and both moments bit for bit."""
    magnitude: Literal["per_token", "batch"] = "per_token"
    """`per_token` (paper): every token's output is L1-normalised before the sum. `batch` (reference code): plain sum of
    absolute outputs."""
    selection: Literal["magnitude", "random"] = "magnitude"
    """`random` keeps as many rows, drawn at random each step: the paper's ablation."""
    first_task: Literal["dense", "masked"] = "dense"
    """Whether the first task of the stream is trained without a mask (reference and default) or with one."""
    layers: Literal["blocks", "all"] = "blocks"
    """`blocks`: every linear layer inside the transformer blocks; `all`: the output head too (as the reference
    does)."""
    mask_bias: bool = True
    """Mask the bias with its weight's rows (the reference leaves it alone: false)."""
    count_padding: bool = False
    """Count padding tokens into the magnitudes, as the reference does."""
    skip_rows: bool = True
    """Do not compute the masked rows of the weight gradients at all (the same gradients, in less time); needs one
    micro-batch per step or `mask_scope: micro_batch`, otherwise the reduced gradients are masked. false: mask always
    after the reduction."""
    mask_scope: Literal["step", "micro_batch"] = "step"
    """With gradient accumulation. `step`: one mask per step from all its micro-batches, exact. `micro_batch`: each
    micro-batch is masked by the magnitudes so far in its step, an approximation that lets it skip rows."""
    untracked: Literal["error", "dense"] = "error"
    """What to do about trainable matrices inside the transformer blocks whose outputs cannot be measured. `error`:
    refuse the model and name them; `dense`: train them without a mask, and say so."""

    def __post_init__(self) -> None:
        """Refuse a scope that only skipping can serve, and ways to measure what random rows do not need."""
        super().__post_init__()
        if self.mask_scope == "micro_batch" and not self.skip_rows:
            raise ValueError("mask_scope: micro_batch masks inside the backward pass, which skip_rows: false forbids")
        if self.selection == "random":
            refuse_given(
                self, "is not used: selection: random draws rows without measuring them", "magnitude", "count_padding"
            )

    def depends_on_split(self, accumulates: bool) -> str | None:
        """Masks of single micro-batches are others in another split; so is how much padding there is."""
        if self.mask_scope == "micro_batch" and accumulates:
            return "mask_scope: micro_batch"
        return "count_padding: true" if self.count_padding else None
