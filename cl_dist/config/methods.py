"""Settings of the methods, one frozen dataclass each (see `schema` for how they are read and checked)."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cl_dist.config.by_task import VariedConfig
from cl_dist.config.ranges import STRICT, Divisor, Fraction, NonNegative, Percent, Positive, PositiveInt, Share


def _refuse_given(settings: object, why: str, *names: str) -> None:
    """ValueError for the first of the settings that differs from its default; a run's config.yaml spells them out."""
    for name in names:
        value = getattr(settings, name)
        if value != getattr(type(settings), name):
            raise ValueError(f"{name}: {str(value).lower()} is not used: {why}")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SequentialConfig:
    """Plain sequential fine-tuning (SeqFT, SeqLoRA): the lower bound."""

    name: Literal["sequential"] = "sequential"
    """Name of the method."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class IncLoraConfig:
    """IncLoRA: new LoRA adapters for every task; those of earlier tasks are frozen and stay active."""

    name: Literal["inclora"]
    """Name of the method."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OLoraConfig(VariedConfig):
    """O-LoRA: IncLoRA whose new adapters are kept orthogonal to the old ones (arXiv 2310.14152)."""

    VARIED: ClassVar[tuple[str, ...]] = ("lambda1", "lambda2")

    name: Literal["olora"]
    """Name of the method."""
    lambda1: NonNegative = 0.5
    """Weight of the penalty sum(abs(A_old A_new^T)) over all modules and old adapters (reference code: 0.5; on the long
    benchmark 0, 0.5 or 5 by task, see `by_task`)."""
    lambda2: NonNegative = 0.0
    """Weight of the sum of the norms of the new lora_A and lora_B (reference code: 0; on the long benchmark 0, 0.1
    or 0.3 by task)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ReplayConfig:
    """Replay: samples of past tasks are mixed into every task's own."""

    name: Literal["replay"]
    """Name of the method."""
    policy: Literal["quota", "reservoir"] = "quota"
    """`quota`: a share of every past task's samples, so that the memory grows with the stream; `reservoir`: a uniform
    sample of all past samples, of fixed size (Algorithm R)."""
    ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Share of every past task's training samples that is learnt again, at least one of each (`quota`)."""
    memory_size: PositiveInt | None = None
    """Samples in the memory, of all past tasks together (`reservoir`, which must be told)."""

    def __post_init__(self) -> None:
        """Refuse a reservoir without a size, and settings that only the other policy reads."""
        if self.policy == "reservoir" and self.memory_size is None:
            raise ValueError("memory_size: missing; policy reservoir needs the number of samples that it may hold")
        if self.policy == "quota" and self.memory_size is not None:
            raise ValueError(
                f"memory_size: {self.memory_size} has a meaning for policy reservoir only; policy quota takes ratio"
            )
        # The default passes: a run's config.yaml spells every setting out.
        if self.policy == "reservoir" and self.ratio != type(self).ratio:
            raise ValueError(f"ratio: {self.ratio} has a meaning for policy quota only; reservoir takes memory_size")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PerTaskConfig:
    """Per-task training, a bound: every task by itself, from the untouched weights."""

    name: Literal["per_task"]
    """Name of the method."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MultiTaskConfig:
    """Multi-task training, a bound: all tasks together, in the place of the first one."""

    name: Literal["multi_task"]
    """Name of the method."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MiguConfig(VariedConfig):
    """MIGU, magnitude-based gradient updating (arXiv 2406.17245)."""

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
            _refuse_given(self, "selection: random draws rows without measuring them", "magnitude", "count_padding")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UnitConfig(VariedConfig):
    """What KIF and its relatives share: units, their importance, and the fixed shares of a fusion by masks."""

    VARIED: ClassVar[tuple[str, ...]] = (
        "order",
        "beta1",
        "beta2",
        "threshold",
        "weight_new",
        "weight_old",
        "weight_neither",
        "orthogonal",
    )

    name: Literal["kif", "tasl", "recurrent_kif"]
    """Name of the method."""
    units: Literal["auto", "matrix", "rank", "row"] = "auto"
    """What is scored and fused as one: `rank` is one LoRA rank of a module (row of lora_A and column of lora_B),
    `matrix` a whole parameter, `row` one row of a parameter. `auto` (KIF's paper): rank with LoRA, else matrix."""
    order: Literal["first", "second", "mixed"] = "mixed"
    """Importance of an element with weight w and gradient g: `first` is abs(w g), `second` its square, `mixed` (KIF's
    paper) abs(w g - (w g)^2 / 2)."""
    beta1: Fraction = 0.85
    """Share of the old value in the smoothed importance."""
    beta2: Fraction = 0.85
    """Share of the old value in the smoothed deviation from it."""
    importance_at: Literal["before_update", "after_update"] = "before_update"
    """`before_update` (paper): importance is taken from the reduced gradient before clipping and the weights that it
    belongs to. `after_update` (reference code): from the clipped gradient and the weights that the optimiser has
    already updated with it."""
    importance_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision in which importance and deviation are kept between steps; bfloat16 halves their memory."""
    threshold: Percent = 20.0
    """Masks: percentage of the units, from the top, that count as important."""
    weight_new: Share = 0.3
    """Masks: share of the new weights in a unit that is important to old and new; with weight_old it is 1."""
    weight_old: Share = 0.7
    """Masks: share of the old weights in a unit that is important to old and new."""
    weight_neither: Share = 0.5
    """Masks: share of the new weights in a unit that is important to neither."""
    orthogonal: Literal["auto"] | NonNegative = "auto"
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 switches it off. `auto` (KIF's paper): 0.1 with LoRA,
    else 0."""
    replay_ratio: Share = 0.0
    """Share of every past task's training samples that is kept and learnt again."""
    keep_unfused: bool = False
    """Also write every task's model as it was before fusion (`unfused/` in the task's folder)."""

    def __post_init__(self) -> None:
        """Refuse shares that do not make a whole."""
        super().__post_init__()
        if abs(self.weight_new + self.weight_old - 1.0) > 1e-9:
            raise ValueError(
                f"weight_new: {self.weight_new} and weight_old {self.weight_old} are not 1 together, so that fusion "
                "would scale the weights"
            )

    def units_for(self, lora: bool) -> Literal["matrix", "rank", "row"]:
        """The units, with `auto` resolved."""
        if self.units != "auto":
            return self.units
        return "rank" if lora else "matrix"

    def orthogonal_for(self, lora: bool) -> float:
        """Weight of the penalty, with `auto` resolved."""
        return (0.1 if lora else 0.0) if self.orthogonal == "auto" else self.orthogonal


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KifConfig(UnitConfig):
    """KIF: importance of skill units, measured while training, decides how old and new weights are fused after every
    task (arXiv 2408.05200).
    """

    VARIED: ClassVar[tuple[str, ...]] = (*UnitConfig.VARIED, "fusion", "tau", "accumulate_new")
    READ_BY: ClassVar[dict[str, tuple[str, ...]]] = {
        "adaptive": ("tau",),
        "hard": ("threshold", "weight_new", "weight_old", "weight_neither"),
    }
    """Settings that one kind of fusion alone reads."""

    name: Literal["kif"]  # the tag that tells the three apart
    """Name of the method."""
    fusion: Literal["adaptive", "hard"] = "adaptive"
    """`adaptive` (paper): shares follow a softmax of the scores; `hard` (TaSL): masks; important units keep their
    side's weights."""
    tau: Divisor = 0.25
    """Temperature of the adaptive fusion: the smaller, the more the larger score decides."""
    accumulate_new: Share = 0.3
    """Share of a task's scores in the accumulated scores; the past keeps the rest."""
    importance_from_step: PositiveInt = 1
    """First step of a task, counted from 1, whose importance is taken; the reference code leaves the first step out
    (2). In a task with fewer steps no unit is more important than another."""
    replay_ratio: Share = 0.0
    """Share of every past task's training samples that is mixed into a task's own (KIF-M, TaSL-M; 0.02 in the papers);
    0: none."""

    def __post_init__(self) -> None:
        """Refuse settings of the other fusion as well."""
        super().__post_init__()
        if self.fusion == "adaptive":
            why = "fusion: adaptive takes shares from the scores and makes no masks"
            _refuse_given(self, why, *self.READ_BY["hard"])
        else:
            _refuse_given(self, "fusion: hard fuses by masks", *self.READ_BY["adaptive"])

    def for_task(self, task: str) -> KifConfig:
        """See `VariedConfig`. Where a task has the other fusion, what only the first one reads has its default."""
        values = self.by_task.get(task, {})
        if values.get("fusion", self.fusion) == self.fusion:
            return super().for_task(task)
        defaults = {name: getattr(type(self), name) for name in self.READ_BY[self.fusion]}
        return replace(self, by_task={}, **{**defaults, **values})


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaslConfig(KifConfig):
    """TaSL, the first version of KIF: matrices are the units and fusion is hard (arXiv 2408.09857)."""

    name: Literal["tasl"]  # type: ignore[assignment]
    """Name of the method."""
    units: Literal["auto", "matrix", "rank", "row"] = "matrix"
    """What is scored and fused as one: `matrix` (paper) is a whole parameter, with LoRA each lora_A and each lora_B;
    `rank`, `row` and `auto` as in kif."""
    order: Literal["first", "second", "mixed"] = "first"
    """Importance of an element with weight w and gradient g: `first` (paper) is abs(w g), `second` its square, `mixed`
    abs(w g - (w g)^2 / 2)."""
    fusion: Literal["adaptive", "hard"] = "hard"
    """`hard` (paper): masks; important units keep their side's weights; `adaptive` (KIF): shares follow a softmax of
    the scores."""
    orthogonal: Literal["auto"] | NonNegative = 0.0
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 (paper) switches it off, `auto` is 0.1 with LoRA."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RecurrentKifConfig(UnitConfig):
    """Recurrent-KIF, KIF's successor: steps on the task alternate with steps on a small memory of past tasks, and after
    each such cycle the two changes are fused by the importance of either (arXiv 2502.17510).
    """

    VARIED: ClassVar[tuple[str, ...]] = (*UnitConfig.VARIED, "outer_learning_rate", "outer_loss_weight")

    name: Literal["recurrent_kif"]
    """Name of the method."""
    inner_steps: PositiveInt = 8
    """Steps on the task's own samples in a cycle."""
    outer_steps: PositiveInt = 4
    """Steps on the memory in a cycle; they come on top of the task's own steps."""
    outer_learning_rate: Positive | None = None
    """Learning rate of the steps on the memory; null: as in the task's own."""
    outer_loss_weight: Positive = 1.0
    """What the loss of the steps on the memory is multiplied by. The reference code divides it by the number of
    micro-batches of a step on the task, although there is one on the memory: 0.25 with its scripts' settings."""
    schedule_over: Literal["all_steps", "inner_steps"] = "all_steps"
    """What train.schedule and train.warmup_steps count: `all_steps`, or `inner_steps` (reference code) the task's own
    alone; steps on the memory then have the rate of the next one."""
    fuse_last_cycle: bool = True
    """Whether a last cycle with fewer than inner_steps own steps has steps on the memory and is fused; the reference
    code does neither (false)."""
    empty_inner_scores: bool = False
    """Start the importance to the task from zero after every cycle (the reference code's scripts do: true); false: it
    goes on from cycle to cycle."""
    empty_outer_scores: bool = False
    """The same for the importance to the past (the reference code's scripts: false)."""
    masks: Literal["units", "elements"] = "units"
    """What the masks of a fusion decide about: whole `units`, or single `elements` (reference code), whose threshold is
    that of all elements of the model together."""
    order: Literal["first", "second", "mixed"] = "first"
    """Importance of an element with weight w and gradient g: `first` (reference code) is abs(w g), `second` its square,
    `mixed` abs(w g - (w g)^2 / 2)."""
    weight_new: Share = 0.4
    """Share of the task's change in a unit that is important to the task and to the past; with weight_old it is 1."""
    weight_old: Share = 0.6
    """Share of the memory's change in a unit that is important to the task and to the past."""
    weight_neither: Share = 0.5
    """Share of the task's change in a unit that is important to neither; the rest is the memory's."""
    orthogonal: Literal["auto"] | NonNegative = 0.0
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 (reference code) switches it off, `auto` is 0.1 with
    LoRA."""
    replay_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Share of every past task's training samples that makes the memory, at least one of each (paper: 0.02)."""
    keep_unfused: bool = False
    """Also write every task's model as it was before its last fusion (`unfused/` in the task's folder)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EwcConfig(VariedConfig):
    """EWC, elastic weight consolidation: a quadratic penalty holds back the weights that mattered to past tasks (arXiv
    1612.00796).
    """

    VARIED: ClassVar[tuple[str, ...]] = ("weight",)

    name: Literal["ewc"]
    """Name of the method."""
    weight: NonNegative = 1.0
    """Weight lambda of the penalty, `lambda / 2 * sum F (theta - anchor)^2`, beside the mean loss per target. 1 is what
    Bayes' rule says for tasks of equally many samples with one target each; larger ones are common."""
    variant: Literal["separate", "online"] = "separate"
    """`separate` (paper): a penalty for every past task, of which the sum is kept. `online` (Schwarz et al. 2018): one
    penalty, whose anchor is the newest weights and whose Fisher information decays."""
    gamma: Share = 0.95
    """`online`: what is left of the past's Fisher information when a task's is added."""
    fisher_samples: PositiveInt | None = 128
    """Training samples of a task, drawn by the seed, that its Fisher information is measured on; null: all."""
    fisher_batch: PositiveInt = 1
    """Samples whose gradients are added before they are squared. 1 is exact. More are measured at once, which takes the
    place of the Fisher information where the samples' gradients have the mean zero; at most a global batch."""

    def __post_init__(self) -> None:
        """Refuse a decay that nothing would read; the default passes, since a run's config.yaml spells it out."""
        super().__post_init__()
        if self.variant == "separate" and self.gamma != type(self).gamma:
            raise ValueError(f"gamma: {self.gamma} has a meaning for variant online only; separate forgets nothing")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LwfConfig(VariedConfig):
    """LwF, learning without forgetting: the old model's responses on the new task's samples are learnt along (arXiv
    1606.09282).
    """

    VARIED: ClassVar[tuple[str, ...]] = ("weight", "temperature")

    name: Literal["lwf"]
    """Name of the method."""
    weight: NonNegative = 1.0
    """Weight of the divergence from the old model beside the loss, both in the mean over targets."""
    temperature: Divisor = 2.0
    """What both models' logits are divided by (paper: 2); the divergence is multiplied by its square."""
    top_k: PositiveInt | None = 64
    """How many of the old model's likeliest classes (tokens) are kept for each target; the others count as one. null:
    all, 4 bytes each."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class AgemConfig:
    """A-GEM, averaged gradient episodic memory: what in a step's gradient points against the past samples' is taken out
    (arXiv 1812.00420).
    """

    name: Literal["agem"]
    """Name of the method."""
    memory_ratio: Annotated[float, Field(gt=0.0, le=1.0)] = 0.02
    """Share of every past task's training samples that makes the memory, at least one of each, drawn by the seed."""
    memory_batch: PositiveInt | None = None
    """Samples of the memory, drawn anew for every step, whose gradient is the reference; at most a global batch, which
    is what null takes."""


MethodConfig = Annotated[
    SequentialConfig
    | IncLoraConfig
    | OLoraConfig
    | ReplayConfig
    | EwcConfig
    | LwfConfig
    | AgemConfig
    | PerTaskConfig
    | MultiTaskConfig
    | MiguConfig
    | KifConfig
    | TaslConfig
    | RecurrentKifConfig,
    Field(discriminator="name"),
]
