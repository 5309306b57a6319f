"""Every setting of a run: one frozen dataclass per component.

The docstring under a field is its help text (`cl-dist recipe --explain` prints it), its annotation is its type and
range. Types are checked strictly by pydantic; combinations of fields are checked in `__post_init__`, whose messages
start with the field's name (cl_dist.config.problems puts the component's key in front). Nothing here imports torch, so
that a typing error in a recipe is told within a second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    Field,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)
from pydantic.dataclasses import dataclass

from cl_dist.config.deepspeed import refuse_raw_settings
from cl_dist.config.formats import (
    allowed_names,
    check_format,
    describe_unread,
    make_reader,
    make_shared,
    part,
    side_by_side,
    summaries,
)
from cl_dist.config.objectives import FACTS, Family, ObjectiveName, objectives_of
from cl_dist.config.plugins import names_class
from cl_dist.config.ranges import (
    MOST_INT,
    STRICT,
    Choices,
    Divisor,
    Fraction,
    Minutes,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    Seconds,
)
from cl_dist.config.unread import refuse_unread
from cl_dist.methods.catalogue import MethodEntry, default_method
from cl_dist.methods.config import check_methods
from cl_dist.tasks.formats.catalogue import find_format
from cl_dist.tasks.formats.format import Format, StreamSettings

if TYPE_CHECKING:
    from cl_dist.config.objectives import ObjectiveFacts

BUILTIN_FAMILIES: dict[str, Family] = {
    "builtin:llama-tiny": "decoder",
    "builtin:t5-tiny": "encoder-decoder",
    "builtin:roberta-tiny": "encoder",
}
BUILTIN_MODELS = tuple(BUILTIN_FAMILIES)

TASK_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*")
"""A task's name becomes a folder of the run: no separators, no leading dot, hence no way out of the run folder."""


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
    head and what an adapter would not reach (docs/models.md)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """The language model and what of it is trained."""

    name_or_path: str
    """A built-in tiny model (`builtin:llama-tiny`, `builtin:t5-tiny`, `builtin:roberta-tiny`), a local folder in
    Hugging Face format, or a Hugging Face model id."""
    gguf_file: str | None = None
    """Name of a GGUF file inside `name_or_path` to load the weights and the tokenizer from."""
    objective: Literal["auto", ObjectiveName] = "auto"
    """What the model is trained to do; `auto` reads it off the architecture (an encoder is a classifier)."""
    lora: LoraConfig | None = None
    """Adapters to train in place of the whole model; absent means full fine-tuning."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for models whose authors you trust."""
    attention: Literal["auto", "sdpa", "eager"] = "auto"
    """Attention implementation. `auto`: sdpa, or eager where the model's family has no sdpa (Gemma 2, GPT-Neo, BLOOM,
    DeBERTa); a line of the log says so."""

    @property
    def known_objective(self) -> ObjectiveName | None:
        """The objective if the recipe alone settles it; None if that depends on the model's own configuration."""
        if self.objective != "auto":
            return self.objective
        family = BUILTIN_FAMILIES.get(self.name_or_path)
        return None if family is None else objectives_of(family)[0]

    @property
    def known_facts(self) -> ObjectiveFacts | None:
        """The facts about that objective."""
        return None if self.known_objective is None else FACTS[self.known_objective]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TaskConfig:
    """One task of the stream."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """Name of the task: letters, digits, `-`, `_` and `.`; it names a folder of the run and, in the benchmark formats,
    the task's files."""
    format: Annotated[str, Choices(allowed_names, summaries)] = "jsonl"
    """How the data is stored."""
    path: str | None = None
    """Folder or file of the data; a relative path is looked up below `stream.root`, else below the recipe's folder.
    Data that is generated has none."""
    labels: tuple[str, ...] | None = None
    """The answers that are allowed (classification). Absent: read from labels.json where the format has one, else the
    distinct answers of the training split where they are few (`stream.max_labels`). `[]`: there are none, the task is
    to generate text."""
    epochs: PositiveInt | None = None
    """Passes over this task's training samples; null: train.epochs."""
    reader: Format = Field(default=Format(), exclude=True, kw_only=True)
    """The format, with its own settings of this task, which stand beside these in a recipe."""

    @model_validator(mode="before")
    @classmethod
    def _part(cls, data: Any) -> Any:
        return part(data, TaskConfig, "reader")

    @field_validator("format")
    @classmethod
    def _check_format(cls, name: str) -> str:
        return check_format(name, "stream.tasks[].format")

    @field_validator("reader", mode="plain")
    @classmethod
    def _make_reader(cls, given: Any, info: ValidationInfo) -> Format:
        name = info.data.get("format")
        return Format() if name is None else make_reader(name, given, TaskConfig, strict=info.mode == "json")

    @model_serializer(mode="wrap")
    def _side_by_side(self, common: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return side_by_side(common(self), [self.reader], in_stream=False)

    def __post_init__(self) -> None:
        """Refuse unsafe names, and a path that nothing would read."""
        if not TASK_NAME.fullmatch(self.name):
            raise ValueError(
                f'name: "{self.name}" cannot name a folder; allowed: letters, digits, "-", "_" and ".", no leading "."'
            )
        if not self.reader.HAS_PATH and self.path is not None:
            raise ValueError(f'path: "{self.path}" is not read: format {self.format} is generated and has no path')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StreamConfig:
    """The tasks, in the order in which they are learnt."""

    tasks: tuple[TaskConfig, ...] = ()
    """The tasks in order; or none, where `order` names them."""
    order: int | str | None = None
    """In place of `tasks`: a published order (`1` to `6`, `superni-1`, `superni-2`, `sgd-1` to `sgd-6`) or an order
    folder of CL_Benchmark. All its tasks are looked up in `root`, in the format `format`."""
    format: Annotated[str, Choices(allowed_names)] = "tasl"
    """Format of the tasks that `order` names."""
    epochs_by_task: dict[str, PositiveInt] = Field(default_factory=dict)
    """Passes over the training samples of some of the tasks that `order` names, such as {mnli: 2}; the others have
    train.epochs. Tasks that are listed have `epochs` of their own."""
    root: str | None = None
    """Folder that relative paths of tasks start from."""
    max_train_samples: PositiveInt | None = None
    """Use only the first so many training samples of each task."""
    max_eval_samples: PositiveInt | None = None
    """Use only the first N evaluation samples of each task; of dialogues, up to the end of the last one's turn."""
    eval_split: Literal["test", "dev"] = "test"
    """Split to evaluate on; where a task has no such file, the other one serves and the log says so."""
    max_labels: PositiveInt = 50
    """A task without stated labels counts as classification when its training answers have at most this many distinct
    values, no more than the square root of their number, and each occurs at least twice."""
    empty_answers: Literal["error", "keep", "skip"] = "error"
    """A record whose answer is empty: `error` names it and ends the run; `keep` learns it, that is to answer nothing
    (as the public code of TaSL and KIF); `skip` leaves it out, and the log says how many."""
    shared: tuple[StreamSettings, ...] = Field(default=(), exclude=True, kw_only=True)
    """What formats of the tasks have for all of their tasks, beside these settings in a recipe."""

    @model_validator(mode="before")
    @classmethod
    def _part(cls, data: Any) -> Any:
        return part(data, StreamConfig, "shared")

    @field_validator("format")
    @classmethod
    def _check_format(cls, name: str) -> str:
        return check_format(name, "stream.format")

    @field_validator("shared", mode="plain")
    @classmethod
    def _make_shared(cls, given: Any, info: ValidationInfo) -> tuple[StreamSettings, ...]:
        if not {"tasks", "format"} <= set(info.data):
            return ()
        classes = _formats(info.data["tasks"], info.data["format"])
        return make_shared(classes, given, StreamConfig, strict=info.mode == "json")

    @model_serializer(mode="wrap")
    def _side_by_side(self, common: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return side_by_side(common(self), self.shared, in_stream=True)

    @property
    def formats(self) -> dict[str, type[Format]]:
        """The formats of the tasks, by name."""
        return _formats(self.tasks, self.format)

    def __post_init__(self) -> None:
        """Refuse a stream without tasks, and two tasks of one name: files and results are found by it."""
        if bool(self.tasks) == (self.order is not None):
            problem = "both are given" if self.tasks else "neither is given"
            raise ValueError(f"tasks: a stream has either tasks or an order; {problem}")
        if self.tasks and self.epochs_by_task:
            raise ValueError("epochs_by_task: is for the tasks that an order names; give tasks[].epochs in its place")
        names = [task.name for task in self.tasks]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f'tasks: the name "{twice}" is given twice; every task of a stream has its own')
        formats = self.formats
        if self.format != type(self).format and self.format not in formats:
            raise ValueError(
                f"format: {self.format} is for the tasks of an order; here every task has a format of its own"
            )
        for settings in self.shared:
            settings.check(formats)
        unread = describe_unread(self, formats)
        if unread is not None:
            raise ValueError(unread)


def _formats(tasks: Sequence[TaskConfig], order_format: str) -> dict[str, type[Format]]:
    """The formats of a stream's tasks, by name; of an order's, where none are listed."""
    if tasks:
        return {task.format: type(task.reader) for task in tasks}
    found = find_format(order_format, "stream.format")
    return {} if found is None else {order_format: found}


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
    eps: Divisor = 1e-8
    """AdamW's denominator offset."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate over a task's steps, after the warm-up."""
    warmup_steps: NonNegativeInt = 0
    """Steps of linear warm-up at the start of every task."""
    max_length: PositiveInt = 512
    """Longest input in tokens: prompt and answer for a decoder, the source for an encoder-decoder. The prompt is cut
    for it, the answer never unless long_answers says so."""
    max_target_length: PositiveInt = 50
    """Longest answer in tokens; what becomes of a longer one says long_answers. A recipe that gives `max_length` alone
    gets half of it, at most 50."""
    long_answers: Literal["error", "cut"] = "error"
    """A training answer that is too long: `error` names the sample and ends the run; `cut` (as the public code of TaSL
    and KIF) keeps its start and the token that ends it, and says once for each task how many were cut. A label of a
    classification task is never cut, nor are the answers that evaluation compares with."""
    truncate: Literal["middle", "left", "right"] = "middle"
    """Where a prompt that is too long is cut. `middle` keeps the instruction at its start and the cue at its end."""
    template: Literal["none", "chat"] = "none"
    """`chat`: every prompt becomes a user's turn in the tokenizer's own chat template and every answer the assistant's,
    in training and in evaluation. Decoders only."""
    date: str = "2024-07-26"
    """Day (YYYY-MM-DD) that chat templates which write the date into a prompt are given, in place of the day on which
    the run happens to be computed: a run that goes on tomorrow asks with the same prompts."""
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
    max_skipped_steps: NonNegativeInt = 0
    """How many optimiser steps in a row may be left out because the loss or the gradient's norm is NaN or infinite: no
    rank changes weights, moments or what methods measure then. The next one ends the run; 0: the first."""
    check_replicas_every: PositiveInt | None = None
    """Compare the ranks' weights every so many steps of a task, and end the run where they differ; under stage 3 only
    those that every rank holds whole. null: never."""

    def __post_init__(self) -> None:
        """Refuse grouping by length in file order, and a day that is none."""
        if self.group_by_length and not self.shuffle:
            raise ValueError("group_by_length: true reorders the samples, which shuffle: false forbids; change one")
        if not _is_day(self.date):
            raise ValueError(f'date: "{self.date}" is not a day; allowed: YYYY-MM-DD, such as 2024-07-26')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ZeroConfig:
    """How DeepSpeed shards the training state."""

    stage: Literal[0, 1, 2, 3] = 2
    """0: nothing sharded; 1: optimiser state; 2: and gradients; 3: and weights."""
    offload: bool = False
    """Keep the optimiser's state in CPU memory (stages 1 to 3)."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed settings, merged into the generated ones: buckets, communication and what stage 3 keeps
    (docs/deepspeed.md lists all). What cl_dist owns (batch sizes, precision, stage, clipping, optimiser), what is not
    read at this stage and what was not tested is refused by name."""

    def __post_init__(self) -> None:
        """Refuse offloading an optimiser that is not sharded, and raw settings that this engine does not take."""
        if self.offload and self.stage == 0:
            raise ValueError("offload: true needs stage 1, 2 or 3, but stage is 0")
        refuse_raw_settings(self.deepspeed, self.stage)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LaunchConfig:
    """How `cl-dist run` starts its ranks."""

    processes: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    """Ranks to start on this machine. Under torchrun, deepspeed, mpirun or srun the ranks that they started are
    used."""
    timeout_seconds: Seconds = 1800.0
    """A collective operation that takes longer than this ends the run. Set it longer than the longest work of one rank
    that the others wait for: rank 0 writing the exported model, a rank writing its part of a state."""
    hang_seconds: Seconds | None = 1200.0
    """A job none of whose ranks gets anything done for so long (a micro-batch, an evaluation batch, a file, a part of
    loading) is ended, with every rank's stacks in the run folder; null: never. Longer than the longest of these;
    well below timeout_seconds, which would end the run first and says less (with NCCL, no more than SIGABRT)."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class GeneralConfig:
    """General ability: tasks of lm-evaluation-harness, run on the model between the tasks of the stream."""

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Names of tasks or groups of lm-evaluation-harness, such as hellaswag, arc_challenge, winogrande, humaneval."""
    after: Literal["all"] | tuple[str, ...] = ("untouched", "last")
    """When: `all`, or a list of `untouched` (before any training), `first`, `last` and names of tasks of the stream."""
    include_path: str | None = None
    """Folder with task files (YAML) of your own; a relative path starts from the recipe's folder."""
    limit: PositiveInt | None = None
    """Use only the first so many documents of each task. For trials: such scores are not comparable with others."""
    num_fewshot: NonNegativeInt | None = None
    """Examples in the prompt; null: what the task file says."""
    batch_size: PositiveInt | None = None
    """Requests per rank and forward pass; null: eval.batch_size."""
    chat_template: bool = False
    """Put the prompts into the tokenizer's chat template."""
    confirm_unsafe_code: bool = False
    """Run tasks that execute code which the model has written (humaneval), unprotected, as you, on this machine."""

    def __post_init__(self) -> None:
        """Refuse a name that is given twice: results are found by it."""
        twice = next((name for name in self.tasks if self.tasks.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f'tasks: "{twice}" is given twice')


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EvalConfig:
    """Scoring after every task."""

    mode: Literal["auto", "likelihood", "generate", "perplexity"] = "auto"
    """`likelihood` scores each allowed label by its likelihood (fast, deterministic); `generate` decodes greedily and
    compares the text; `perplexity` is for text. `auto`: likelihood where a task has labels, perplexity for text, else
    generate."""
    metric: Literal["auto", "exact_match", "macro_f1", "rouge_l", "jga"] = "auto"
    """Score of answers; `auto`: exact match where a task has labels, `jga` for dialogue states, else ROUGE-L.
    `macro_f1` is for tasks with labels; beside the one of exact match and macro-F1 that is the score the log has the
    other. `jga` (joint goal accuracy) is the share of a dialogue's turns of which all slots are right."""
    normalise: Literal["none", "punctuation"] = "none"
    """What exact match and macro-F1 leave out of account besides case and white space: `punctuation` strips ASCII
    punctuation too, as the public scorer of O-LoRA and MIGU does."""
    rouge_tokenizer: Literal["default", "unicode", "xlingual"] = "default"
    """What ROUGE-L compares. `default`: stemmed words of ASCII letters and digits; any other letter is dropped, so that
    Russian or Japanese scores 0. `unicode`: the same words, words of other scripts, and each character of scripts
    without blanks. `xlingual`: GPT-2's tokens, as Super-NaturalInstructions scores its cross-lingual track."""
    rouge_tokenizer_path: str | None = None
    """Where `xlingual` finds GPT-2's tokenizer: a folder or a Hugging Face id; null: `gpt2`, which is downloaded
    once."""
    tasks: Literal["all", "seen"] = "all"
    """Evaluate on all tasks of the stream after each task, or only on those seen so far (then no forward transfer)."""
    before_training: bool = True
    """Evaluate the untouched model first (the matrix's first row)."""
    batch_size: PositiveInt = 16
    """Samples per rank and forward pass."""
    max_new_tokens: PositiveInt = 50
    """Longest generated answer in tokens. A recipe that does not give it gets train.max_target_length."""
    general: GeneralConfig | None = None
    """General ability, by lm-evaluation-harness, beside the scores of the stream's own tasks."""

    def __post_init__(self) -> None:
        """Refuse settings that nothing would read."""
        if self.rouge_tokenizer_path is not None and self.rouge_tokenizer != "xlingual":
            raise ValueError(
                f'rouge_tokenizer_path: "{self.rouge_tokenizer_path}" has a meaning for rouge_tokenizer: xlingual '
                f"only, not {self.rouge_tokenizer}"
            )
        if self.normalise != "none" and (self.metric in ("rouge_l", "jga") or self.mode == "perplexity"):
            raise ValueError(
                f"normalise: {self.normalise} is for exact match and macro-F1, not for what is scored here"
            )
        written = self.mode in ("auto", "generate") and self.metric in ("auto", "rouge_l")
        if self.rouge_tokenizer != "default" and not written:
            raise ValueError(f"rouge_tokenizer: {self.rouge_tokenizer} is for ROUGE-L, not for what is scored here")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CheckpointConfig:
    """State that an interrupted run resumes from; the end of every task is always saved."""

    every_steps: PositiveInt | None = 200
    """Save inside a task every so many optimiser steps; null: not for that reason."""
    every_minutes: Minutes | None = None
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
    method: tuple[MethodEntry, ...] = (default_method(),)
    """One method, or a list of methods that compose in that order."""
    train: TrainConfig = Field(default_factory=TrainConfig)
    zero: ZeroConfig = Field(default_factory=ZeroConfig)
    launch: LaunchConfig = Field(default_factory=LaunchConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    plugins: tuple[str, ...] = ()
    """Modules with methods or formats of your own, by name or as the path of a .py file; what is neither installed nor
    an absolute path is looked for beside the recipe (docs/extending.md)."""
    output_dir: Annotated[str, Field(min_length=1)]
    """Run folder. Absent in a recipe: runs/<recipe name>, below the working directory."""

    def __post_init__(self) -> None:
        """Refuse settings of different components that exclude each other."""
        check_methods(self)
        self._check_warmup()
        self._check_lengths()
        self._check_evaluation()
        self._check_template()
        self._check_general()
        self._check_accumulation()
        self._check_batch()
        refuse_unread(self)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the form `module:Class` in the recipe: methods and formats of the user's own."""
        formats = (self.stream.format, *(task.format for task in self.stream.tasks))
        return tuple(name for name in (*(each.name for each in self.method), *formats) if names_class(name))

    def _check_warmup(self) -> None:
        """Refuse a warm-up that no task completes."""
        most = self.train.max_steps_per_task
        if most is None:
            return
        extra = sum(method.extra_steps(most) for method in self.method)
        if self.train.warmup_steps > most + extra:
            more = f" and the {extra} steps that the method adds" if extra else ""
            raise ValueError(
                f"train.warmup_steps: {self.train.warmup_steps} is more than max_steps_per_task {most}{more}, so that "
                f"learning_rate would never be reached; allowed: at most {most + extra}"
            )

    def _check_lengths(self) -> None:
        train, facts = self.train, self.model.known_facts
        if facts is not None and facts.answer_in_prompt and train.max_target_length >= train.max_length:
            raise ValueError(
                f"train.max_target_length: {train.max_target_length} leaves no room for a prompt in train.max_length "
                f"{train.max_length}, which holds both for a decoder; allowed: less than {train.max_length}"
            )

    def _check_evaluation(self) -> None:
        evaluation, objective, facts = self.eval, self.model.known_objective, self.model.known_facts
        if evaluation.mode == "generate" and facts is not None and not facts.generates:
            raise ValueError(f"eval.mode: generate needs a model that generates text, but its objective is {objective}")
        if evaluation.mode == "perplexity" and facts is not None and facts.needs_labels:
            raise ValueError(f"eval.mode: perplexity needs a language model, but its objective is {objective}")
        allowed = {"likelihood": ("auto", "exact_match", "macro_f1"), "perplexity": ("auto",)}.get(evaluation.mode)
        if allowed is not None and evaluation.metric not in allowed:
            raise ValueError(
                f"eval.metric: {evaluation.metric} scores generated text, eval.mode is {evaluation.mode}, which allows "
                + " or ".join(allowed)
            )

    def _check_template(self) -> None:
        objective, facts = self.model.known_objective, self.model.known_facts
        if self.train.template == "chat" and facts is not None and not facts.answer_in_prompt:
            raise ValueError(f"train.template: chat is for decoders, but the model's objective is {objective}")

    def _check_general(self) -> None:
        general, objective, facts = self.eval.general, self.model.known_objective, self.model.known_facts
        if general is None:
            return
        if facts is not None and not facts.generates:
            raise ValueError(f"eval.general: needs a model that generates text, but its objective is {objective}")
        names = [task.name for task in self.stream.tasks]
        allowed = ("untouched", "first", "last", *names)
        unknown = next((place for place in general.after if names and place not in allowed), None)
        if general.after != "all" and unknown is not None:
            raise ValueError(f'eval.general.after: "{unknown}" is none of all, {", ".join(allowed)}')

    def _check_batch(self) -> None:
        train, ranks = self.train, self.launch.processes
        batch = train.micro_batch_size * train.gradient_accumulation * ranks
        if batch > MOST_INT:
            raise ValueError(
                f"train.micro_batch_size: {train.micro_batch_size}, with train.gradient_accumulation "
                f"{train.gradient_accumulation} and {ranks} ranks, makes a global batch of {batch}; allowed: at most "
                f"{MOST_INT}"
            )

    def _check_accumulation(self) -> None:
        types = self.zero.deepspeed.get("data_types", {})
        if self.zero.stage == 0 and self.train.dtype == "bfloat16" and "grad_accum_dtype" in types:
            raise ValueError(
                "zero.deepspeed.data_types.grad_accum_dtype: DeepSpeed adds gradients up in bfloat16 at stage 0 with "
                "train.dtype bfloat16; remove it, or give zero.stage 1, 2 or 3"
            )


def _is_day(text: str) -> bool:
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False
