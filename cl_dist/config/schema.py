"""Every setting of a run: one frozen dataclass per component.

The docstring under a field is its help text, which `cl-dist recipe --explain` prints; the annotation gives type and
range. Pydantic checks types strictly. `__post_init__` checks the fields of one component against each other, and its
messages start with the field's name (cl_dist.config.problems puts the component's key in front);
cl_dist.config.combinations does the same across components. Nothing here imports torch, so a typo in a recipe is
reported within a second.
"""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from cl_dist.config.combinations import check_combinations
from cl_dist.config.deepspeed import refuse_raw_settings
from cl_dist.config.formats import StreamConfig as StreamConfig
from cl_dist.config.formats import TaskConfig as TaskConfig
from cl_dist.config.objectives import FACTS, Family, ObjectiveName, objectives_of
from cl_dist.config.plugins import names_class
from cl_dist.config.ranges import (
    STRICT,
    Divisor,
    Fraction,
    Minutes,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Seconds,
)
from cl_dist.methods.catalogue import MethodEntry, default_method

if TYPE_CHECKING:
    from cl_dist.config.objectives import ObjectiveFacts

BUILTIN_FAMILIES: dict[str, Family] = {
    "builtin:llama-tiny": "decoder",
    "builtin:t5-tiny": "encoder-decoder",
    "builtin:roberta-tiny": "encoder",
}
BUILTIN_MODELS = tuple(BUILTIN_FAMILIES)


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
    """Names (or name endings) of the linear layers that get an adapter. `all-linear` takes all of them except the
    output head and layers that an adapter cannot reach (docs/models.md)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The language model and which of its weights are trained."""

    name_or_path: str
    """A built-in tiny model (`builtin:llama-tiny`, `builtin:t5-tiny`, `builtin:roberta-tiny`), a local folder in
    Hugging Face format, or a Hugging Face model id."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `name_or_path` to load the weights and the tokenizer from."""
    objective: Literal["auto", ObjectiveName] = "auto"
    """What the model is trained to do. `auto` infers it from the architecture (an encoder is a classifier)."""
    lora: LoraConfig | None = None
    """Adapters to train instead of the whole model. If absent, all weights are fine-tuned."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Use it only for models whose authors you trust."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation. `auto` is sdpa, or eager for model families without sdpa (Gemma 2, GPT-Neo, BLOOM,
    DeBERTa), which the log reports."""

    @property
    def known_objective(self) -> ObjectiveName | None:
        """The objective if the recipe alone determines it; None if it depends on the model's configuration."""
        if self.objective != "auto":
            return self.objective
        family = BUILTIN_FAMILIES.get(self.name_or_path)
        return None if family is None else objectives_of(family)[0]

    @property
    def known_facts(self) -> ObjectiveFacts | None:
        """The facts about `known_objective`; None if that is None."""
        return None if self.known_objective is None else FACTS[self.known_objective]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrainConfig:
    """Training on one task."""

    epochs: PositiveInt = 1
    """Passes over a task's training samples."""
    max_steps_per_task: PositiveInt | None = None
    """Stop each task after N optimiser steps."""
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
    eps: Divisor = 1e-8
    """AdamW's denominator offset."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning-rate schedule over a task's steps, after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up at the start of every task."""
    max_length: PositiveInt = 512
    """Longest input in tokens: prompt plus answer for a decoder, the source for an encoder-decoder. Longer prompts are
    cut; answers are cut only if long_answers says so."""
    max_target_length: PositiveInt = 50
    """Longest answer in tokens; long_answers decides what happens to longer ones. If a recipe gives only `max_length`,
    the default is half of it, at most 50."""
    long_answers: Literal["error", "cut"] = "error"
    """What to do with a training answer that is too long. `error` names the sample and ends the run. `cut` (as in the
    public code of TaSL and KIF) keeps its start and the token that ends it; the log reports once per task how many were
    cut. The labels of a classification task and the reference answers of an evaluation are never cut."""
    truncate: Literal["middle", "left", "right"] = "middle"
    """Where to cut a prompt that is too long. `middle` keeps the instruction at its start and the cue at its end."""
    template: Literal["none", "chat"] = "none"
    """`chat`: in training and evaluation, the tokenizer's chat template turns every prompt into a user turn and every
    answer into an assistant turn. Decoders only."""
    date: str = "2024-07-26"
    """Day (YYYY-MM-DD) for chat templates that write today's date into the prompt. It is fixed so that a run resumed
    tomorrow uses the same prompts."""
    clip: Positive | None = 1.0
    """Largest gradient norm, measured after masking; null turns clipping off."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the forward and backward pass. Master weights and moments are always float32."""
    grad_dtype: Literal["float32", "bfloat16"] | None = None
    """Precision in which gradients are summed over micro-batches and ranks; null: as `dtype`, which is what DeepSpeed
    does. With bfloat16 training, `float32` loses nothing in these sums. It needs zero.stage 1, 2 or 3, and takes 4 more
    bytes per parameter that a rank holds gradients of (at stage 1 without offload: of every parameter), and twice the
    traffic of the reduction."""
    tf32: bool = False
    """Multiply float32 matrices on GPUs in TF32, which keeps 10 bits of a factor's 23: several times faster on NVIDIA
    GPUs since Ampere, about as precise as float16. No effect on bfloat16 products and on CPUs."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 42
    """Seed of everything random: sample order, dropout, initial adapters, random masks."""
    shuffle: bool = True
    """Shuffle a task's samples every epoch. With false, each step takes the next consecutive samples of the file as its
    global batch."""
    group_by_length: bool = False
    """Put samples of similar length into one batch. Needs shuffle."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass instead of storing them."""
    keep_optimizer: bool = False
    """Carry AdamW's moments over from task to task. By default every task starts with fresh ones, as in the papers."""
    loss_average: Literal["tokens", "micro_batch"] = "tokens"
    """`tokens`: the mean over all answer tokens of the global batch, which is the same for any number of ranks.
    `micro_batch`: the mean of the micro-batches' means, as in older Trainers."""
    max_skipped_steps: NonNegativeInt = 0
    """How many optimiser steps in a row may be skipped because the loss or the gradient norm is NaN or infinite. A
    skipped step leaves weights, moments and the methods' statistics unchanged on all ranks. One more ends the run; with
    0, the first one does."""
    check_replicas_every: PositiveInt | None = None
    """Compare the ranks' weights every N steps of a task, and end the run if they differ. Under stage 3, only weights
    that every rank holds in full are compared. null: never."""

    def __post_init__(self) -> None:
        """Refuse grouping by length in file order, and anything but a calendar day."""
        if self.group_by_length and not self.shuffle:
            raise ValueError("group_by_length: true reorders the samples, which shuffle: false forbids; change one")
        try:
            is_day = date.fromisoformat(self.date).isoformat() == self.date  # Python 3.11 accepts more than YYYY-MM-DD
        except ValueError:
            is_day = False
        if not is_day:
            raise ValueError(f'date: "{self.date}" is not a day; allowed: YYYY-MM-DD, such as 2024-07-26')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ZeroConfig:
    """How DeepSpeed shards the training state."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: nothing is sharded; 1: optimiser state; 2: gradients too; 3: weights too."""
    offload: bool = False
    """Keep the optimiser's state in CPU memory (stages 1 to 3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed settings, merged into the generated ones: buckets, communication and what stage 3 keeps
    (docs/deepspeed.md lists them all). Settings that cl_dist owns (batch sizes, precision, stage, clipping, optimiser),
    that this stage does not read, or that are untested are refused by name."""

    def __post_init__(self) -> None:
        """Refuse to offload an optimiser that is not sharded, and raw settings that this engine does not support."""
        if self.offload and self.stage == 0:
            raise ValueError("offload: true needs stage 1, 2 or 3, but stage is 0")
        refuse_raw_settings(self.deepspeed, self.stage)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaunchConfig:
    """How `cl-dist run` starts its ranks."""

    processes: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = 1
    """Ranks to start on this machine; `auto` is one per GPU, or one on a machine without. Ignored under torchrun,
    deepspeed, mpirun and srun, which start the ranks themselves."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """What the ranks compute on. `auto` is a GPU each if this machine's GPUs can be used, else the CPU, with a warning
    if there is a GPU after all. `cuda` insists on GPUs: without one that can be used, the run ends before anything is
    read. `cpu` leaves GPUs unused."""
    timeout_seconds: Seconds = 1800.0
    """A collective operation that takes longer ends the run. It must exceed the longest time that ranks wait for one of
    them, such as rank 0 writing the exported model or a rank writing its part of a state."""
    hang_seconds: Seconds | None = 1200.0
    """If no rank makes progress for this long (a micro-batch, an evaluation batch, a file, a part of loading), the job
    is ended and every rank's stacks are written to the run folder; null: never. It must exceed the longest of these
    steps, and stay well below timeout_seconds, which would end the run first and report less (with NCCL, only
    SIGABRT)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GeneralConfig:
    """General ability: lm-evaluation-harness tasks, run on the model between the tasks of the stream."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of lm-evaluation-harness tasks or groups, such as hellaswag, arc_challenge, winogrande, humaneval."""
    after: Literal["all"] | tuple[str, ...] = ("untouched", "last")
    """When to run them: `all`, or a list of `untouched` (before any training), `first`, `last` and names of tasks of
    the stream."""
    include_path: str | None = None
    """Folder with your own task files (YAML); a relative path starts from the recipe's folder."""
    limit: PositiveInt | None = None
    """Use only the first N documents of each task. For trials: such scores cannot be compared with others."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in the prompt; null: as in the task file."""
    batch_size: PositiveInt | None = None
    """Requests per rank and forward pass; null: eval.batch_size."""
    chat_template: bool = False
    """Format the prompts with the tokenizer's chat template."""
    confirm_unsafe_code: bool = False
    """Run tasks that execute code written by the model (humaneval), on this machine, as you, without a sandbox."""

    def __post_init__(self) -> None:
        """Refuse a name that is given twice, since it identifies the results."""
        twice = next((name for name in self.tasks if self.tasks.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f'tasks: "{twice}" is given twice')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """Scoring after every task."""

    mode: Literal["auto", "likelihood", "generate", "perplexity"] = "auto"
    """`likelihood` scores each allowed label by its likelihood (fast, deterministic); `generate` decodes greedily and
    compares the text; `perplexity` is for plain text. `auto` is likelihood for tasks with labels, perplexity for plain
    text, and generate for all others."""
    metric: Literal["auto", "exact_match", "macro_f1", "rouge_l", "jga"] = "auto"
    """Score of answers. `auto` is exact match for tasks with labels, `jga` for dialogue states, and ROUGE-L for all
    others. `macro_f1` is for tasks with labels; the log has both exact match and macro-F1, whichever is the score.
    `jga` (joint goal accuracy) is the fraction of dialogue turns with all slots right."""
    normalise: Literal["none", "punctuation"] = "none"
    """What exact match and macro-F1 ignore besides case and white space. `punctuation` strips ASCII punctuation too, as
    the public scorer of O-LoRA and MIGU does."""
    rouge_tokenizer: Literal["default", "unicode", "xlingual"] = "default"
    """What ROUGE-L compares. `default`: stemmed words of ASCII letters and digits; all other letters are dropped, so
    Russian or Japanese scores 0. `unicode`: the same words, words of other scripts, and single characters in scripts
    without spaces. `xlingual`: GPT-2's tokens, as in the cross-lingual track of Super-NaturalInstructions."""
    rouge_tokenizer_path: str | None = None
    """GPT-2's tokenizer for `xlingual`: a folder or a Hugging Face id; null: `gpt2`, which is downloaded once."""
    tasks: Literal["all", "seen"] = "all"
    """After each task, evaluate on all tasks of the stream, or only on those seen so far (then there is no forward
    transfer)."""
    before_training: bool = True
    """Evaluate the untrained model first (the matrix's first row)."""
    batch_size: PositiveInt = 16
    """Samples per rank and forward pass."""
    max_new_tokens: PositiveInt = 50
    """Longest generated answer in tokens. If a recipe does not give it, it is train.max_target_length."""
    gather_weights: Literal["auto", "always", "never"] = "auto"
    """ZeRO-3 only: whether generation holds all weights whole on every rank, and not just a layer at a time, which is
    gathered anew for every token. `auto` does so if they take at most half of the memory that is free on every rank.
    The answers are the same."""
    general: GeneralConfig | None = None
    """General ability, measured with lm-evaluation-harness in addition to the stream's own tasks."""

    def __post_init__(self) -> None:
        """Refuse settings that nothing reads."""
        if self.rouge_tokenizer_path is not None and self.rouge_tokenizer != "xlingual":
            raise ValueError(
                f'rouge_tokenizer_path: "{self.rouge_tokenizer_path}" is read only with rouge_tokenizer: xlingual, not '
                f"{self.rouge_tokenizer}"
            )
        if self.normalise != "none" and (self.metric in ("rouge_l", "jga") or self.mode == "perplexity"):
            raise ValueError(
                f"normalise: {self.normalise} is for exact match and macro-F1, which this recipe does not score"
            )
        may_use_rouge = self.mode in ("auto", "generate") and self.metric in ("auto", "rouge_l")
        if self.rouge_tokenizer != "default" and not may_use_rouge:
            raise ValueError(
                f"rouge_tokenizer: {self.rouge_tokenizer} is for ROUGE-L, which this recipe does not score"
            )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """State that an interrupted run resumes from. The end of every task is always saved."""

    every_steps: PositiveInt | None = 200
    """Save inside a task every N optimiser steps; null: never by step count."""
    every_minutes: Minutes | None = None
    """Save inside a task when N minutes have passed since the last save; null: never by time. With neither every_steps
    nor every_minutes, state is saved only at the end of a task and when the run is asked to stop."""
    keep: PositiveInt = 2
    """How many of the current task's newest saved states to keep. If the newest is damaged, a resume starts from the
    one before it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """Everything that defines a run."""

    model: ModelConfig
    stream: StreamConfig
    method: tuple[MethodEntry, ...] = (default_method(),)
    """One method, or a list of methods that are composed in this order."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    plugins: tuple[str, ...] = ()
    """Modules with your own methods or formats, by name or as the path of a .py file. A module that is not installed
    and a relative path are looked up in the recipe's folder (docs/extending.md)."""
    track: tuple[Literal["wandb", "tensorboard", "mlflow"], ...] = ()
    """Trackers that get loss, scores and speed besides the run folder: `tensorboard` (into the run folder), `wandb`,
    `mlflow` (docs/tracking.md). Each needs its library, which the extra of the same name installs."""
    output_dir: Annotated[str, Field(min_length=1)]
    """Run folder. If absent, it is runs/<recipe name> in the working directory."""

    def __post_init__(self) -> None:
        """Refuse settings of different components that contradict each other or have no effect."""
        check_combinations(self)

    @staticmethod
    def load(name_or_path: str | os.PathLike[str], **changes: Any) -> Recipe:
        """Read a shipped recipe or a YAML file, change settings, and check the result.

        Args:
            name_or_path: Name of a shipped recipe, or path of a file.
            changes: Settings to change: `train={"epochs": 2}`, `method="migu"` (the name alone; settings that the new
                method does not have are dropped), `method={"name": "migu", "threshold": 0.5}` (the whole method).

        Raises:
            BadInput: The recipe is wrong; one line per problem.
        """
        from cl_dist.config.load import load_recipe
        from cl_dist.config.overrides import as_overrides

        return load_recipe(os.fspath(name_or_path), as_overrides(changes))[0]

    @staticmethod
    def build(name: str = "recipe", folder: str | os.PathLike[str] = ".", **settings: Any) -> Recipe:
        """Make a recipe from settings as a YAML file writes them, and check it.

        Args:
            name: From which `output_dir` follows if it is not given: `runs/<name>`.
            folder: Where relative paths start.
            settings: `model`, `stream` and whatever differs from the defaults; a model or a method may be a name alone.

        Raises:
            BadInput: The recipe is wrong; one line per problem.
        """
        from cl_dist.config.load import build_recipe

        return build_recipe(settings, name, Path(folder))

    def to_yaml(self) -> str:
        """The recipe with every setting as YAML, which `cl-dist run` takes."""
        from cl_dist.config.load import dump_recipe

        return dump_recipe(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write `to_yaml` to a file, which is replaced, and return its path."""
        file = Path(path)
        file.write_text(self.to_yaml(), encoding="utf-8")
        return file

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the form `module:Class` in the recipe: the user's own methods and formats."""
        formats = (self.stream.format, *(task.format for task in self.stream.tasks))
        return tuple(name for name in (*(each.name for each in self.method), *formats) if names_class(name))
