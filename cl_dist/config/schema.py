"""Every setting of a run: one frozen dataclass per component.

The docstring under a field is its help text (`cl-dist recipe --explain` prints it), its annotation is its type and
range. Types are checked strictly by pydantic; combinations of fields are checked in `__post_init__`, whose messages
start with the field's name (cl_dist.config.problems puts the component's key in front). Nothing here imports torch, so
that a typing error in a recipe is told within a second.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

STRICT = ConfigDict(extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False, validate_default=False)

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Percent = Annotated[float, Field(ge=0.0, le=100.0)]

BUILTIN_MODELS = ("builtin:llama-tiny", "builtin:t5-tiny", "builtin:roberta-tiny")
FORMATS = ("builtin", "cl_benchmark", "tasl", "trace", "jsonl", "text", "huggingface")
BUILTIN_OBJECTIVES = {
    "builtin:llama-tiny": "causal_lm",
    "builtin:t5-tiny": "seq2seq_lm",
    "builtin:roberta-tiny": "classification",
}

TASK_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
"""A task's name becomes a folder of the run: no separators, no leading dot, hence no way out of the run folder."""

OWNED_DEEPSPEED_SETTINGS = {
    "train_batch_size": "train.micro_batch_size and train.gradient_accumulation",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.gradient_accumulation",
    "gradient_clipping": "train.clip",
    "optimizer": "train.learning_rate, train.weight_decay, train.beta1, train.beta2 and train.eps",
    "scheduler": "train.schedule and train.warmup_steps",
    "fp16": "train.dtype",
    "bf16": "train.dtype",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.offload_optimizer": "zero.offload",
}
"""Raw DeepSpeed settings that cl_dist sets itself, and the keys of the recipe that they are set from."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LoraConfig:
    """Low-rank adapters (LoRA, arXiv 2106.09685) in place of full fine-tuning."""

    r: PositiveInt = 8
    """Rank of the adapters."""
    alpha: Positive = 32.0
    """Scale: the adapter's output is multiplied by alpha / r."""
    dropout: Fraction = 0.0
    """Dropout probability on the adapter's input."""
    target_modules: tuple[str, ...] | Literal["all-linear"] = "all-linear"
    """Names (or name endings) of the linear layers that get an adapter; `all-linear` takes every one but the output
    head."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The language model and what of it is trained."""

    name_or_path: str
    """A built-in tiny model (`builtin:llama-tiny`, `builtin:t5-tiny`, `builtin:roberta-tiny`), a local folder in
    Hugging Face format, or a Hugging Face model id."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `name_or_path` to load the weights and the tokenizer from."""
    objective: Literal["auto", "causal_lm", "seq2seq_lm", "classification", "masked_lm"] = "auto"
    """What the model is trained to do; `auto` reads it off the architecture (an encoder is a classifier)."""
    lora: LoraConfig | None = None
    """Adapters to train in place of the whole model; absent means full fine-tuning."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose authors you trust."""
    attention: Literal["sdpa", "eager"] = "sdpa"
    """Attention implementation."""

    @property
    def known_objective(self) -> str | None:
        """The objective as far as the recipe alone tells it; None where it depends on the model's own configuration."""
        return BUILTIN_OBJECTIVES.get(self.name_or_path) if self.objective == "auto" else self.objective


DataFormat = Literal["builtin", "cl_benchmark", "tasl", "trace", "jsonl", "text", "huggingface"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """One task of the stream."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """Name of the task: letters, digits, `-`, `_` and `.`; it names a folder of the run and, in the benchmark formats,
    the task's files."""
    format: DataFormat = "jsonl"
    """How the data is stored: `builtin` (generated), `cl_benchmark` (O-LoRA, MIGU), `tasl` (TaSL, KIF), `trace`,
    `jsonl` (`input`/`output` records), `text` (plain text, for pre-training), `huggingface` (a data set by name or
    saved to disk)."""
    path: str | None = None
    """Folder or file of the data; a relative path is looked up below `stream.root`, else below the recipe's folder.
    `builtin` has none."""
    labels: tuple[str, ...] | None = None
    """The answers that are allowed (classification). Absent: read from labels.json where the format has one, else the
    distinct answers of the training and evaluation split where there are at most `stream.max_labels`."""
    input_field: str = "input"
    """Field of a record with the prompt (`jsonl` and `huggingface`)."""
    output_field: str = "output"
    """Field of a record with the answer (`jsonl` and `huggingface`)."""
    subset: str | None = None
    """Configuration name of a Hugging Face data set."""

    def __post_init__(self) -> None:
        """Refuse unsafe names, and a subset that nothing would read."""
        if not TASK_NAME.fullmatch(self.name):
            raise ValueError(
                f'name: "{self.name}" cannot name a folder; allowed: letters, digits, "-", "_" and ".", no leading "."'
            )
        if self.format != "huggingface" and self.subset is not None:
            raise ValueError(f'subset: "{self.subset}" has a meaning for format huggingface only, not {self.format}')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamConfig:
    """The tasks, in the order in which they are learnt."""

    tasks: tuple[TaskConfig, ...] = ()
    """The tasks in order; or none, where `order` names them."""
    order: int | str | None = None
    """In place of `tasks`: a published order (`1` to `6`, `superni-1`, `superni-2`) or a CL_Benchmark order folder. All
    its tasks are looked up in `root`, in the format `format`."""
    format: DataFormat = "tasl"
    """Format of the tasks that `order` names."""
    root: str | None = None
    """Folder that relative paths of tasks start from."""
    max_train_samples: PositiveInt | None = None
    """Use only the first so many training samples of each task."""
    max_eval_samples: PositiveInt | None = None
    """Use only the first so many evaluation samples of each task."""
    eval_split: Literal["test", "dev"] = "test"
    """Split to evaluate on; where a task has no such file, the other one serves and the log says so."""
    instruction_file: str | None = None
    """`instruction_config.json` of a CL_Benchmark copy; absent: looked for beside the data, else the published
    texts."""
    max_labels: PositiveInt = 50
    """A task without stated labels counts as classification when it has at most so many distinct answers."""

    def __post_init__(self) -> None:
        """Refuse a stream without tasks, and two tasks of one name: files and results are found by it."""
        if bool(self.tasks) == (self.order is not None):
            problem = "both are given" if self.tasks else "neither is given"
            raise ValueError(f"tasks: a stream has either tasks or an order; {problem}")
        names = [task.name for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f'tasks: the name "{twice}" is given twice; every task of a stream has its own')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SequentialConfig:
    """Plain sequential fine-tuning (SeqFT, SeqLoRA): the lower bound."""

    name: Literal["sequential"] = "sequential"
    """Name of the method."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MiguConfig:
    """MIGU, magnitude-based gradient updating (arXiv 2406.17245)."""

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

    def __post_init__(self) -> None:
        """Refuse a scope that only skipping can serve."""
        if self.mask_scope == "micro_batch" and not self.skip_rows:
            raise ValueError("mask_scope: micro_batch masks inside the backward pass, which skip_rows: false forbids")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KifConfig:
    """KIF: importance of skill units, measured while training, decides how old and new weights are fused after every
    task (arXiv 2408.05200).
    """

    name: Literal["kif"]
    """Name of the method."""
    units: Literal["auto", "matrix", "rank", "row"] = "auto"
    """What is scored and fused as one: `rank` is one LoRA rank of a module (row of lora_A and column of lora_B),
    `matrix` a whole parameter, `row` one row of a parameter. `auto` (paper): rank with LoRA, else matrix."""
    order: Literal["first", "second", "mixed"] = "mixed"
    """Importance of an element with weight w and gradient g: `first` is abs(w g), `second` its square, `mixed` (paper)
    abs(w g - (w g)^2 / 2)."""
    beta1: Fraction = 0.85
    """Share of the old value in the smoothed importance."""
    beta2: Fraction = 0.85
    """Share of the old value in the smoothed deviation from it."""
    fusion: Literal["adaptive", "hard"] = "adaptive"
    """`adaptive` (paper): shares follow a softmax of the scores; `hard` (TaSL): important units keep their side's
    weights."""
    tau: Positive = 0.25
    """Temperature of the adaptive fusion: the smaller, the more the larger score decides."""
    threshold: Percent = 20.0
    """Hard fusion: percentage of the units, from the top, that count as important."""
    weight_new: Share = 0.3
    """Hard fusion: share of the new weights in a unit that is important to old and new; with weight_old it is 1."""
    weight_old: Share = 0.7
    """Hard fusion: share of the old weights in a unit that is important to old and new."""
    weight_neither: Share = 0.5
    """Hard fusion: share of the new weights in a unit that is important to neither."""
    accumulate_new: Share = 0.3
    """Share of a task's scores in the accumulated scores; the past keeps the rest."""
    orthogonal: Literal["auto"] | NonNegative = "auto"
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 switches it off. `auto` (paper): 0.1 with LoRA, else
    0."""
    replay_ratio: Share = 0.0
    """Share of every past task's training samples that is mixed into a task's own (KIF-M, TaSL-M; 0.02 in the papers);
    0: none."""
    keep_unfused: bool = False
    """Also write every task's model as it was before fusion (`unfused/` in the task's folder)."""

    def __post_init__(self) -> None:
        """Refuse shares that do not make a whole."""
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
class TaslConfig(KifConfig):
    """TaSL, the first version of KIF: matrices are the units and fusion is hard (arXiv 2408.09857)."""

    name: Literal["tasl"]  # type: ignore[assignment]  # the tag that tells the two apart
    """Name of the method."""
    units: Literal["auto", "matrix", "rank", "row"] = "matrix"
    """What is scored and fused as one: `matrix` (paper) is a whole parameter, with LoRA each lora_A and each lora_B;
    `rank`, `row` and `auto` as in kif."""
    order: Literal["first", "second", "mixed"] = "first"
    """Importance of an element with weight w and gradient g: `first` (paper) is abs(w g), `second` its square, `mixed`
    abs(w g - (w g)^2 / 2)."""
    fusion: Literal["adaptive", "hard"] = "hard"
    """`hard` (paper): important units keep their side's weights; `adaptive` (KIF): shares follow a softmax of the
    scores."""
    orthogonal: Literal["auto"] | NonNegative = 0.0
    """Weight of the penalty that keeps LoRA's ranks orthogonal; 0 (paper) switches it off, `auto` is 0.1 with LoRA."""


MethodConfig = Annotated[SequentialConfig | MiguConfig | KifConfig | TaslConfig, Field(discriminator="name")]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """One task's training."""

    epochs: PositiveInt = 1
    """Passes over a task's training samples."""
    max_steps_per_task: PositiveInt | None = None
    """Stop a task after so many optimiser steps."""
    micro_batch_size: PositiveInt = 8
    """Samples per rank and forward pass. Global batch = micro_batch_size * gradient_accumulation * ranks."""
    gradient_accumulation: PositiveInt = 1
    """Micro-batches per optimiser step."""
    learning_rate: Positive = 1e-4
    """Peak learning rate of AdamW."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay of AdamW (matrices only; norms and biases are not decayed)."""
    beta1: Fraction = 0.9
    """AdamW's first decay rate."""
    beta2: Fraction = 0.999
    """AdamW's second decay rate."""
    eps: Positive = 1e-8
    """AdamW's denominator offset."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over a task's steps, after the warm-up."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps of linear warm-up at the start of every task."""
    max_length: PositiveInt = 512
    """Longest input in tokens: prompt and answer for a decoder, the source for an encoder-decoder. The prompt is cut,
    never the answer."""
    max_target_length: PositiveInt = 50
    """Longest answer in tokens; a longer one is an error that names the sample. A recipe that gives `max_length` alone
    gets half of it, at most 50."""
    truncate: Literal["middle", "left", "right"] = "middle"
    """Where a prompt that is too long is cut. `middle` keeps the instruction at its start and the cue at its end."""
    clip: Positive | None = 1.0
    """Largest gradient norm, taken after masking; null switches clipping off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of forward and backward. Master weights and moments are always float32."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Seed of everything that is drawn: order, dropout, initial adapters, random masks."""
    shuffle: bool = True
    """Shuffle a task's samples every epoch; false: the global batch of a step is the next consecutive samples of the
    file."""
    group_by_length: bool = False
    """Put samples of similar length into one batch (with shuffle)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    keep_optimizer: bool = False
    """Carry AdamW's moments over from task to task; by default every task starts with fresh ones, as in the papers."""
    loss_average: Literal["tokens", "micro_batch"] = "tokens"
    """`tokens`: the mean over all answer tokens of the global batch, the same for any number of ranks. `micro_batch`:
    the mean of the micro-batches' means (as older Trainers do)."""

    def __post_init__(self) -> None:
        """Refuse grouping by length in file order."""
        if self.group_by_length and not self.shuffle:
            raise ValueError("group_by_length: true reorders the samples, which shuffle: false forbids; change one")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ZeroConfig:
    """How DeepSpeed shards the training state."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: nothing sharded; 1: optimiser state; 2: and gradients; 3: and weights."""
    offload: bool = False
    """Keep the optimiser's state in CPU memory (stages 1 to 3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed settings, merged into the generated ones. Settings that cl_dist owns (batch sizes, precision,
    stage, clipping, optimiser) are refused here."""

    def __post_init__(self) -> None:
        """Refuse offloading an optimiser that is not sharded, and raw settings that cl_dist owns."""
        if self.offload and self.stage == 0:
            raise ValueError("offload: true needs stage 1, 2 or 3, but stage is 0")
        for key, source in OWNED_DEEPSPEED_SETTINGS.items():
            if _has_setting(self.deepspeed, key):
                raise ValueError(f"deepspeed.{key}: set by cl_dist from {source}; remove it here")
        self._check_shards()

    def _check_shards(self) -> None:
        if _has_setting(self.deepspeed, "sparse_gradients"):
            raise ValueError("deepspeed.sparse_gradients: not supported by ZeRO; remove it")
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, Mapping):
            raise ValueError(f"deepspeed.zero_optimization: {zero!r} is not a mapping of settings")
        if zero.get("round_robin_gradients"):
            # DeepSpeed builds its map from parameters to shards in another order than the shards have then.
            raise ValueError("deepspeed.zero_optimization.round_robin_gradients: true mixes up shards; allowed: false")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaunchConfig:
    """How `cl-dist run` starts its ranks."""

    processes: PositiveInt = 1
    """Ranks to start on this machine. Under torchrun, deepspeed, mpirun or srun the ranks that they started are
    used."""
    timeout_seconds: Positive = 1800.0
    """A collective operation that takes longer than this ends the run."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """Scoring after every task."""

    mode: Literal["auto", "likelihood", "generate", "perplexity"] = "auto"
    """`likelihood` scores each allowed label by its likelihood (fast, deterministic); `generate` decodes greedily and
    compares the text; `perplexity` is for text. `auto`: likelihood where a task has labels, perplexity for text, else
    generate."""
    metric: Literal["auto", "exact_match", "rouge_l"] = "auto"
    """Score of generated text; `auto`: exact match where a task has labels, else ROUGE-L."""
    tasks: Literal["all", "seen"] = "all"
    """Evaluate on all tasks of the stream after each task, or only on those seen so far (then no forward transfer)."""
    before_training: bool = True
    """Evaluate the untouched model first (the matrix's first row)."""
    batch_size: PositiveInt = 16
    """Samples per rank and forward pass."""
    max_new_tokens: PositiveInt = 50
    """Longest generated answer in tokens."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """State that an interrupted run resumes from; the end of every task is always saved."""

    every_steps: PositiveInt | None = 200
    """Save inside a task every so many optimiser steps; null: not for that reason."""
    every_minutes: Positive | None = None
    """Save inside a task once so many minutes have passed since the last save; null: not for that reason. Without
    every_steps and every_minutes a task's state is saved at its end and when the run is asked to stop."""
    keep: PositiveInt = 2
    """How many of the newest saved states of the task under way are kept: where the newest is damaged, a resume goes on
    from the one before it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """A run, whole."""

    model: ModelConfig
    stream: StreamConfig
    method: tuple[MethodConfig, ...] = (SequentialConfig(),)
    """One method, or a list of methods that compose in that order."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    output_dir: Annotated[str, Field(min_length=1)]
    """Run folder. Absent in a recipe: runs/<recipe name>, below the working directory."""

    def __post_init__(self) -> None:
        """Refuse settings of different components that exclude each other."""
        self._check_methods()
        self._check_lengths()
        self._check_evaluation()

    def _check_methods(self) -> None:
        names = [method.name for method in self.method]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f'method: "{twice}" is given twice; a method composes with others, not with itself')
        if not names:
            raise ValueError("method: the list is empty; for plain fine-tuning give the method sequential")
        self._check_fusion([method for method in self.method if isinstance(method, KifConfig)])

    def _check_fusion(self, methods: Sequence[KifConfig]) -> None:
        if len(methods) > 1:
            raise ValueError("method: kif and tasl both fuse the weights after a task; give one of them")
        for method in methods:
            if self.model.lora is None and method.units == "rank":
                raise ValueError("method.units: rank is a rank of LoRA, and there is no model.lora; give matrix or row")
            if self.model.lora is None and method.orthogonal_for(lora=False) > 0:
                raise ValueError(
                    f"method.orthogonal: {method.orthogonal} weighs a penalty on LoRA's matrices, and there is no "
                    "model.lora; give 0"
                )

    def _check_lengths(self) -> None:
        train = self.train
        if self.model.known_objective == "causal_lm" and train.max_target_length >= train.max_length:
            raise ValueError(
                f"train.max_target_length: {train.max_target_length} leaves no room for a prompt in train.max_length "
                f"{train.max_length}, which holds both for a decoder; allowed: less than {train.max_length}"
            )

    def _check_evaluation(self) -> None:
        evaluation, objective = self.eval, self.model.known_objective
        if evaluation.mode == "generate" and objective in ("classification", "masked_lm"):
            raise ValueError(f"eval.mode: generate needs a model that generates text, but its objective is {objective}")
        if evaluation.mode == "perplexity" and objective == "classification":
            raise ValueError("eval.mode: perplexity needs a language model, but its objective is classification")
        if evaluation.mode in ("likelihood", "perplexity") and evaluation.metric != "auto":
            raise ValueError(f"eval.metric: {evaluation.metric} scores generated text, eval.mode is {evaluation.mode}")


def _has_setting(settings: Mapping[str, Any], key: str) -> bool:
    """Whether nested `settings` hold the dotted `key`."""
    head, _, rest = key.partition(".")
    if head not in settings or not rest:
        return head in settings
    return isinstance(settings[head], Mapping) and _has_setting(settings[head], rest)
