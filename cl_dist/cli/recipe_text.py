"""The text of a first recipe, and why it says so: lengths from the data, batch and precision from the machine."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cl_dist.config.schema import BUILTIN_FAMILIES, ModelConfig
from cl_dist.config.words import listed, show
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.machine import Device, cpu_device, find_gpus
from cl_dist.tasks.formats.format import EmptyAnswers
from cl_dist.tasks.types import Task

DEFAULT_MODEL = "builtin:llama-tiny"
LONGEST_INPUT = 1024
"""Tokens. Longer prompts are cut unless the user raises `train.max_length`: attention and activations grow with it."""
PIECE = 512
"""Tokens of a piece of a document."""
TEMPLATE_TOKENS = 64
"""Room for what a chat template puts around prompt and answer."""
MEASURED_CHARACTERS = 20_000_000
"""Of all samples' text. Beyond it, only as many samples of each task are tokenised as fit."""
MICRO_BATCH_TOKENS = {"cuda": 4096, "cpu": 2048}
"""Most tokens of a micro-batch, padding included; 8 samples at most."""
STATE_BYTES = 16
"""Per trained parameter with AdamW: weight and gradient in bfloat16, master weight and two moments in float32."""
FREE_SHARE = 0.7
"""Of a device's memory for weights and training state; the rest is for activations."""
LEAST_STEPS, MOST_EPOCHS = 60, 8
"""A small task is repeated until it has this many steps."""
SHOWN_LABELS = 8


@dataclass(frozen=True)
class Source:
    """One task, as the recipe names it."""

    name: str
    path: str
    """As written into the recipe."""
    settings: dict[str, Any]
    """What the recipe says about it besides name and path."""

    @property
    def entry(self) -> dict[str, Any]:
        """The task in the recipe's `stream.tasks`."""
        return {"name": self.name, "path": self.path, **self.settings}


def find_device() -> tuple[Device, int]:
    """What a rank trains on, and how many ranks `launch.processes: auto` starts here."""
    gpus = find_gpus(os.environ).devices
    return (gpus[0], len(gpus)) if gpus else (cpu_device(), 1)


@dataclass(frozen=True)
class Lengths:
    """Of the data, in tokens."""

    counted: str
    """How they were found, in words."""
    source: int
    """Longest prompt, with its answer if the model reads both as one text."""
    answer: int
    limit: int
    """Longest input of the model, as far as it is known, and `LONGEST_INPUT` at most."""

    documents: bool
    """Whether all tasks are plain text."""
    template: bool
    """Whether prompts and answers become the turns of a chat template."""

    @property
    def max_length(self) -> int:
        """A multiple of 8 that holds the longest sample, up to the limit; for documents, the length of a piece."""
        if self.documents:
            return min(self.limit, PIECE)
        return min(self.limit, _eights(max(self.source, self.max_target_length + 8)))

    @property
    def max_target_length(self) -> int:
        """A multiple of 8 that holds the longest answer, up to half of the limit."""
        return min(self.limit // 2, _eights(self.answer))

    @property
    def cuts_answers(self) -> bool:
        """Whether some answers are longer than that."""
        return self.answer > self.max_target_length


def _eights(number: int) -> int:
    return -(-number // 8) * 8


def measure(model: ModelConfig, tasks: Sequence[Task]) -> Lengths:
    """The lengths of the tasks' samples in the model's tokens."""
    tokenizer, counted = _tokenizer(model)
    apart = BUILTIN_FAMILIES.get(model.name_or_path) == "encoder-decoder" or _family(model) == "encoder-decoder"
    template = any(task.kind == "generation" for task in tasks) and _has_chat_template(model)
    special = TEMPLATE_TOKENS if template else 2  # else at most one before the prompt and one behind the answer
    source = answer = 1
    for task in tasks:
        samples = [*task.train, *task.evaluation]
        size = sum(len(each.prompt) + len(each.answer) for each in samples)
        step = max(1, -(-size * len(tasks) // MEASURED_CHARACTERS))
        prompts = tokenizer([each.prompt for each in samples[::step]])
        answers = tokenizer([each.answer for each in samples[::step]])
        # The space before an answer can be a token of its own.
        together = [p + special + (0 if apart else a + 1) for p, a in zip(prompts, answers, strict=True)]
        source = max(source, *together)
        if task.kind != "text":
            answer = max(answer, *(a + 2 for a in answers))
    limit, documents = min(LONGEST_INPUT, _positions(model)), all(task.kind == "text" for task in tasks)
    return Lengths(counted, source, answer, limit, documents, template)


def _tokenizer(model: ModelConfig) -> tuple[Any, str]:
    """A function from texts to numbers of tokens, and how it counts, in words."""
    from tokenizers import Tokenizer

    if model.name_or_path in BUILTIN_FAMILIES:
        return (lambda texts: [len(text.encode()) for text in texts]), "one token per byte"
    file = _model_file(model, "tokenizer.json")
    if file is None:
        return (lambda texts: [-(-len(text.encode()) // 3) for text in texts]), "estimated: a token per three bytes"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    return (
        lambda texts: [len(each.ids) for each in tokenizer.encode_batch(texts, add_special_tokens=False)]
    ), "with the model's tokenizer"


def _model_file(model: ModelConfig, name: str) -> Path | None:
    """A small file of the model, downloaded if necessary; None if it has none of that name."""
    from cl_dist.models.check import local_folder

    folder = local_folder(model.name_or_path)
    if folder is not None:
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model.name_or_path, name))
    except Exception:  # whatever it is, the run reports it; here an estimate will do
        return None


def _config(model: ModelConfig) -> dict[str, Any]:
    file = None if model.name_or_path in BUILTIN_FAMILIES else _model_file(model, "config.json")
    return {} if file is None else dict(json.loads(file.read_text(encoding="utf-8")))


def _family(model: ModelConfig) -> str:
    built_in = BUILTIN_FAMILIES.get(model.name_or_path)
    return built_in or ("encoder-decoder" if _config(model).get("is_encoder_decoder") else "decoder")


def _positions(model: ModelConfig) -> int:
    """Longest input of the model in tokens, or `LONGEST_INPUT` if it is not known."""
    from cl_dist.models.position_settings import configured_positions

    if model.name_or_path in BUILTIN_FAMILIES:
        return LONGEST_INPUT if model.name_or_path != "builtin:roberta-tiny" else 512
    return configured_positions(_config(model)).source or LONGEST_INPUT


def _parameters(model: ModelConfig) -> int | None:
    """The model's number of parameters by the size of its files; None if they are not here."""
    from cl_dist.models.check import local_folder

    folder = local_folder(model.name_or_path)
    if folder is None:
        return None
    config = _config(model)
    itemsize = 4 if config.get("dtype", config.get("torch_dtype")) in (None, "float32") else 2
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors")) or sum(
        file.stat().st_size for file in folder.glob("*.bin")
    )
    return size // itemsize


def _has_chat_template(model: ModelConfig) -> bool:
    if model.name_or_path in BUILTIN_FAMILIES or _family(model) != "decoder":
        return False
    if _model_file(model, "chat_template.jinja") is not None:
        return True
    settings = _model_file(model, "tokenizer_config.json")
    return settings is not None and '"chat_template"' in settings.read_text(encoding="utf-8", errors="replace")


def recipe_text(
    target: Path,
    tasks: Sequence[tuple[Source, Task]],
    model: ModelConfig,
    device: Device,
    ranks: int,
    lengths: Lengths,
    empty_answers: EmptyAnswers = "error",
) -> str:
    """The recipe, with the reason for each choice as a comment."""
    lines = _lines(target, tasks, model, device, ranks, lengths, empty_answers)
    # Nothing that a comment quotes, such as a label, may end its line. Values are escaped already.
    return "".join("".join(each if each.isprintable() else "?" for each in line) + "\n" for line in lines)


def _lines(
    target: Path,
    tasks: Sequence[tuple[Source, Task]],
    model: ModelConfig,
    device: Device,
    ranks: int,
    lengths: Lengths,
    empty_answers: EmptyAnswers,
) -> Iterator[str]:
    yield f"# {target.stem}: {count(len(tasks), 'task')} in sequence. Written by cl-dist init; change what you like."
    yield f"#   cl-dist data {quoted(target)}              shows what the model will read"
    yield f"#   cl-dist run {quoted(target)}               trains and scores it; results go to runs/{target.stem}"
    yield "#   cl-dist recipe --explain train.   explains the settings below train"
    yield from _model_lines(model, device, ranks)
    yield from _stream_lines(tasks)
    if empty_answers != "error":
        yield f"  empty_answers: {empty_answers}  # records without an answer are left out, and the log says how many"
    yield "method:"
    yield "  name: migu  # updates only the rows with the largest outputs; cl-dist methods lists the others"
    yield from _train_lines(tasks, model, device, ranks, lengths)
    yield "zero:"
    large = _is_large(model, device, ranks)
    why = "shards the weights too, because the model is large" if large == 3 else "shards gradients and optimiser state"
    yield f"  stage: {3 if large == 3 else 2}  # {why}"
    yield "launch:"
    here = (
        f"{ranks} × {device.name}" if device.kind == "cuda" else f"no usable GPU, so one rank on {device.cores} cores"
    )
    yield f"  processes: auto  # one rank per GPU; on this machine: {here}"


def _model_lines(model: ModelConfig, device: Device, ranks: int) -> Iterator[str]:
    yield "model:"
    if model.name_or_path == DEFAULT_MODEL:
        yield "  # A tiny model with random weights, to try things out without a network; it learns little."
        yield "  # Name your own, a folder or a Hugging Face id; cl-dist init --model also fits the lengths to it."
    yield f"  name_or_path: {_scalar(model.name_or_path)}"
    large = _is_large(model, device, ranks)
    if large:
        size = (_parameters(model) or 0) / 1e9
        yield "  lora:  # adapters: training all weights takes more memory than there is (estimated; see cl-dist plan)"
        yield f"    r: 8  # the model has about {size:.1f} billion parameters"
    elif model.name_or_path not in BUILTIN_FAMILIES and _parameters(model) is None:
        yield "  # All weights are trained. `cl-dist plan` predicts the memory; `lora: {r: 8}` trains adapters instead."


def _is_large(model: ModelConfig, device: Device, ranks: int) -> int:
    """0: all weights can be trained here; 2: adapters, each rank with all weights; 3: adapters on sharded weights."""
    parameters = 0 if model.name_or_path in BUILTIN_FAMILIES else _parameters(model) or 0
    room = FREE_SHARE * device.memory_bytes
    if parameters * STATE_BYTES / ranks <= room:
        return 0
    return 2 if parameters * 2 <= room else 3


def _stream_lines(tasks: Sequence[tuple[Source, Task]]) -> Iterator[str]:
    yield "stream:"
    yield "  tasks:  # in the order in which they are learnt; relative paths start from this file's folder"
    for source, task in tasks:
        yield f"    # {samples_of(task)}; {scoring_of(task)}"
        yield f"    - name: {_scalar(source.name)}"
        yield f"      path: {_scalar(source.path)}"
        for key, value in source.settings.items():
            why = "  # there is no evaluation file: a tenth is held out and never trained on"
            yield f"      {key}: {_scalar(value)}{why if key == 'eval_fraction' else ''}"


def _train_lines(
    tasks: Sequence[tuple[Source, Task]], model: ModelConfig, device: Device, ranks: int, lengths: Lengths
) -> Iterator[str]:
    micro_batch = max(1, min(8, MICRO_BATCH_TOKENS[device.kind] // lengths.max_length))
    least = min(len(task.train) for _, task in tasks)
    micro_batch = min(micro_batch, max(1, least // ranks))
    steps = -(-least // (micro_batch * ranks))
    epochs = max(1, min(MOST_EPOCHS, -(-LEAST_STEPS // steps)))
    rate, why = _learning_rate(model, device, ranks)
    yield "train:"
    yield f"  epochs: {epochs}  # the smallest task has {least} training samples, {count(steps, 'step')} per epoch"
    most = micro_batch * lengths.max_length
    yield f"  micro_batch_size: {micro_batch}  # samples per rank and forward pass, at most {most} tokens"
    yield f"  learning_rate: {rate}  # {why}"
    yield f"  max_length: {lengths.max_length}  # tokens ({lengths.counted}); {_fit(lengths)}"
    if not lengths.documents and lengths.cuts_answers:
        yield f"  max_target_length: {lengths.max_target_length}  # the longest answer has {lengths.answer} tokens"
        yield "  long_answers: cut  # of longer training answers, the start is learnt"
    elif not lengths.documents:
        yield f"  max_target_length: {lengths.max_target_length}  # holds the longest answer; limits generated ones"
    if lengths.template:
        yield "  template: chat  # prompts and answers become the turns of the model's chat template"
    if device.bfloat16 and device.kind == "cuda":
        yield f"  dtype: bfloat16  # {device.name} multiplies it in hardware; master weights stay float32"
    else:
        yield "  dtype: float32  # bfloat16 halves the memory and is slower on most CPUs"


def _fit(lengths: Lengths) -> str:
    """What `max_length` holds, in words."""
    if lengths.documents:
        return "longer documents are divided into pieces of this length"
    if lengths.source > lengths.max_length:
        return f"the longest sample has {lengths.source}; longer prompts are cut in the middle"
    return f"holds the longest sample{f', with {TEMPLATE_TOKENS} for the chat template' if lengths.template else ''}"


def _learning_rate(model: ModelConfig, device: Device, ranks: int) -> tuple[str, str]:
    if model.name_or_path in BUILTIN_FAMILIES:
        return "1e-3", "for the tiny model; 1e-5 to 1e-4 for a pretrained one"
    if _is_large(model, device, ranks):
        return "3e-4", "usual for adapters"
    if _family(model) == "encoder-decoder":
        return "1e-4", "MIGU's, for T5"
    return "2e-5", "usual for pretrained models"


def samples_of(task: Task) -> str:
    """How many samples a task has, in words."""
    held_out = {"held-out": "held out", "train": "the same ones for evaluation"}.get(task.scored_on, task.scored_on)
    return f"{len(task.train)} training samples, {len(task.evaluation)} {held_out}"


def scoring_of(task: Task) -> str:
    """How a task will be scored, in words."""
    if task.kind == "text":
        return "plain text, scored by perplexity"
    if task.labels:
        return f"labels {listed(map(show, task.labels), SHOWN_LABELS)}, scored by their likelihood"
    return "free answers, generated and scored by ROUGE-L"


def count(number: int, what: str) -> str:
    """`1 task`, `2 tasks`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _scalar(value: Any) -> str:
    """A value as YAML on one line: bare if it is read as itself, else in quotes."""
    if isinstance(value, str):
        bare = re.fullmatch(r"[./]*\w[\w ./:-]*", value) is not None and value.isprintable()
        if not (bare and parse_yaml(value, "value") == value):
            return json.dumps(value, ensure_ascii=not value.isprintable())
    return str(value)


def quoted(path: Path) -> str:
    """A path as a shell reads it."""
    return shlex.quote(str(path))
