"""`cl-dist init`: writes a recipe for the user's own data, with the reasons for each choice as comments."""

from __future__ import annotations

import json
import os
import re
import sys
import unicodedata
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.cli.ranks import without_notices
from cl_dist.cli.run import check_stream_and_model
from cl_dist.config.boundary import refusing
from cl_dist.config.files import expand, is_file, is_folder, is_there
from cl_dist.config.load import SUFFIXES, check_recipe, load_recipe
from cl_dist.config.schema import BUILTIN_FAMILIES, ModelConfig
from cl_dist.config.words import listed, show, show_path
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.errors import BadInput
from cl_dist.machine import Device, cpu_device, find_gpus
from cl_dist.state.atomic import advising, write_text
from cl_dist.tasks.types import Task

DEFAULT_MODEL = "builtin:llama-tiny"
HELD_OUT = 0.1
"""`eval_fraction` of a task without evaluation data."""
LONGEST_INPUT = 1024
"""Tokens. Longer prompts are cut unless the user raises `train.max_length`: attention and activations grow with it."""
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

_EPILOG = """\
examples:
  cl-dist init my.yaml --data billing.jsonl shipping.jsonl
  cl-dist init my.yaml --data tickets.csv --input question --output reply --model path/to/model
  cl-dist init my.yaml --data tasks/*.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

Each PATH is one task, in the order in which the model learns them: a file, a folder, or a data set of the Hugging Face
Hub (owner/name). docs/data.md says what is read.
"""


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `init`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "init",
        parents=[common],
        help="write a recipe for your own data",
        description="Write a recipe for your data that runs on this machine, and check the data.",
        epilog=_EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", help="the recipe to write, a .yaml file")
    parser.add_argument("--data", metavar="PATH", nargs="+", required=True, help="the tasks, in order")
    parser.add_argument(
        "--model", metavar="NAME", help=f"a folder or a Hugging Face id (default: {DEFAULT_MODEL}, to try things out)"
    )
    parser.add_argument("--input", metavar="FIELD", help="field or column of the prompts, if it has an unusual name")
    parser.add_argument("--output", metavar="FIELD", help="field or column of the answers, if it has an unusual name")
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
    parser.set_defaults(command=init, works=lambda parsed: True)


def init(arguments: Namespace) -> int:
    """Look at the data, the model and the machine; write the recipe, check it as a run would, and name what is next."""
    with refusing("init"):
        target = _target(arguments)
        model = _model(arguments.model)
        sources = _sources(arguments, target.absolute().parent)
        with without_notices():
            tasks = [_read(source, model, target) for source in sources]
    device, ranks = _device()
    lengths = _lengths(model, [task for _, task in tasks])
    text = "\n".join(_recipe(target, tasks, model, device, ranks, lengths)) + "\n"

    # As a run reads it, before anything is written.
    settings = parse_yaml(text, str(target))
    settings["method"] = [settings["method"]]
    recipe = check_recipe(settings, target.stem, target.absolute().parent)
    here = replace(recipe, launch=replace(recipe.launch, processes=ranks))
    with without_notices():
        check_stream_and_model(here, target.absolute().parent)
    with advising("nothing was written"):
        write_text(target, text)
    assert load_recipe(str(target))[0] == recipe

    width = max(len(source.name) for source, _ in tasks)
    print(f"wrote {target}: {_count(len(tasks), 'task')}, model {model.name_or_path}, method migu\n")
    for source, task in tasks:
        print(f"  {source.name:<{width}}  {_samples(task)}; {_scoring(task)}")
    print(f"\nNext:\n  cl-dist data {_quoted(target)}  shows what the model will read\n", end="")
    print(f"  cl-dist run {_quoted(target)}   trains it and prints a table of scores")
    return 0


@dataclass(frozen=True)
class _Source:
    """One task, as the recipe will name it."""

    name: str
    path: str
    """As written into the recipe."""
    given: str
    """As typed."""
    settings: dict[str, Any]
    """What the recipe says about it besides name and path."""

    @property
    def entry(self) -> dict[str, Any]:
        """The task in the recipe's `stream.tasks`."""
        return {"name": self.name, "path": self.path, **self.settings}


def _target(arguments: Namespace) -> Path:
    path = expand(arguments.file, "FILE")
    if path.suffix not in SUFFIXES:
        raise BadInput(f"FILE: {show_path(path)} is not a YAML file; allowed: a name that ends in .yaml or .yml")
    if is_there(path) and not arguments.force:
        raise BadInput(f"FILE: {show_path(path)} exists already; give another name, or --force to replace it")
    if is_there(path) and not is_file(path):
        raise BadInput(f"FILE: {show_path(path)} is not a file; give another name")
    if not is_folder(path.absolute().parent):
        raise BadInput(f"FILE: there is no folder {show_path(path.absolute().parent)}")
    return path


def _model(name: str | None) -> ModelConfig:
    """The model, checked as far as that is possible without loading it; a folder gets its absolute path."""
    from cl_dist.models.check import check_model_config, local_folder
    from cl_dist.models.hub import check_published

    model = ModelConfig(name_or_path=DEFAULT_MODEL if name is None else name)
    check_model_config(model)
    check_published(model, partial(print, file=sys.stderr, flush=True))
    if model.name_or_path in BUILTIN_FAMILIES or (folder := local_folder(model.name_or_path)) is None:
        return model
    return replace(model, name_or_path=str(folder.absolute()))


# The tasks.


def _sources(arguments: Namespace, folder: Path) -> list[_Source]:
    """The tasks that the paths make. Evaluation files that lie beside a training file belong to its task."""
    from cl_dist.tasks.formats.auto import files_beside

    given = [expand(word, "--data") for word in arguments.data]
    found = [files for path in given if is_file(path) for files in files_beside(path).values()]
    beside = {file.absolute() for files in found for file in files}
    settings = {"input_field": arguments.input, "output_field": arguments.output}
    settings = {key: value for key, value in settings.items() if value is not None}
    sources: list[_Source] = []
    for word, path in zip(arguments.data, given, strict=True):
        if path.absolute() in beside:
            continue
        name = _unused(_task_name(path), [source.name for source in sources])
        sources.append(_Source(name, _path_from(folder, path, word), word, settings))
    return sources


def _task_name(path: Path) -> str:
    """A task's name made of a path's: `Größe 2.jsonl.gz` is `Grosse-2`; `billing/train.csv` is `billing`."""
    stem = re.sub(r"(\.(jsonl|json|csv|tsv|parquet|arrow|txt|gz|zst))+$", "", path.name, flags=re.IGNORECASE)
    if re.fullmatch(r"train|data|", stem, re.IGNORECASE):
        stem = path.absolute().parent.name
    stem = stem.removesuffix(".train").replace("ß", "ss")
    plain = unicodedata.normalize("NFKD", stem).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", plain).strip("-.")[:80] or "task"


def _unused(name: str, taken: Sequence[str]) -> str:
    """The name, or with a number if another task has it in any case: folders of a run are named after tasks."""
    used, number, candidate = {each.casefold() for each in taken}, 1, name
    while candidate.casefold() in used:
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def _path_from(folder: Path, path: Path, word: str) -> str:
    """The path from the recipe's folder; an absolute path and the name of a published data set stay as typed."""
    missing = not is_there(path) and not is_folder(path.parent)
    if path.is_absolute() or missing:
        return str(path) if not missing else word
    relative = os.path.relpath(path.absolute(), folder)
    # Behind a link, `..` leads elsewhere.
    same = os.path.realpath(folder / relative) == os.path.realpath(path)
    return relative if same else str(path.absolute())


def _read(source: _Source, model: ModelConfig, target: Path) -> tuple[_Source, Task]:
    """Read one task as a run would; without evaluation data, some of its samples are held out."""
    try:
        task = _load(source, model, target)
    except BadInput as error:
        held_out = _holding_out(source)
        try:
            return held_out, _load(held_out, model, target)
        except BadInput:
            other = any(sign in str(error) for sign in ("no column", "no field")) and not source.settings
            hint = "; cl-dist init takes their names as --input and --output" if other else ""
            raise BadInput(f"{error}{hint}") from None
    if task.scored_on != "train":
        return source, task
    held_out = _holding_out(source)
    return held_out, _load(held_out, model, target)


def _holding_out(source: _Source) -> _Source:
    return replace(source, settings={**source.settings, "eval_fraction": HELD_OUT})


def _load(source: _Source, model: ModelConfig, target: Path) -> Task:
    folder = target.absolute().parent
    data = {
        "model": {"name_or_path": model.name_or_path},
        "stream": {"tasks": [source.entry]},
        "method": [{"name": "migu"}],
    }
    return check_stream_and_model(check_recipe(data, target.stem, folder), folder)[0]


# Model and machine.


def _device() -> tuple[Device, int]:
    """What a rank trains on, and how many ranks `launch.processes: auto` starts here."""
    gpus = find_gpus(os.environ).devices
    return (gpus[0], len(gpus)) if gpus else (cpu_device(), 1)


@dataclass(frozen=True)
class _Lengths:
    """Of the data, in tokens."""

    counted: str
    """How they were found, in words."""
    source: int
    """Longest prompt, with its answer if the model reads both as one text."""
    answer: int
    limit: int
    """Longest input of the model, as far as it is known, and `LONGEST_INPUT` at most."""

    @property
    def max_length(self) -> int:
        """A multiple of 8 that holds the longest sample, up to the limit."""
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


def _lengths(model: ModelConfig, tasks: Sequence[Task]) -> _Lengths:
    tokenizer, counted = _tokenizer(model)
    apart = BUILTIN_FAMILIES.get(model.name_or_path) == "encoder-decoder" or _family(model) == "encoder-decoder"
    source = answer = 1
    for task in tasks:
        samples = [*task.train, *task.evaluation]
        size = sum(len(each.prompt) + len(each.answer) for each in samples)
        step = max(1, -(-size * len(tasks) // MEASURED_CHARACTERS))
        prompts = tokenizer([each.prompt for each in samples[::step]])
        answers = tokenizer([each.answer for each in samples[::step]])
        # Special tokens: at most one before the prompt and one behind the answer.
        together = [p + 2 + (0 if apart else a) for p, a in zip(prompts, answers, strict=True)]
        source = max(source, *together)
        if task.kind != "text":
            answer = max(answer, *(a + 1 for a in answers))
    return _Lengths(counted, source, answer, min(LONGEST_INPUT, _positions(model)))


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
    from cl_dist.models.check import check_chat_template, local_folder

    if model.name_or_path in BUILTIN_FAMILIES or local_folder(model.name_or_path) is None:
        return False
    try:
        check_chat_template(model)
    except BadInput:
        return False
    return True


# The recipe.


def _recipe(
    target: Path,
    tasks: Sequence[tuple[_Source, Task]],
    model: ModelConfig,
    device: Device,
    ranks: int,
    lengths: _Lengths,
) -> Iterator[str]:
    yield f"# {target.stem}: {_count(len(tasks), 'task')} in sequence. Written by cl-dist init; change what you like."
    yield f"#   cl-dist data {_quoted(target)}              shows what the model will read"
    yield f"#   cl-dist run {_quoted(target)}               trains and scores it; results go to runs/{target.stem}"
    yield "#   cl-dist recipe --explain train.   explains the settings below train"
    yield from _model_lines(model, device, ranks)
    yield from _stream_lines(tasks)
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
        yield "  # A tiny model with random weights, to try things out without a network; it learns little. Name your"
        yield "  # own: a folder or a Hugging Face id. cl-dist init with --model also fits lengths and learning rate to it."
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


def _stream_lines(tasks: Sequence[tuple[_Source, Task]]) -> Iterator[str]:
    yield "stream:"
    yield "  tasks:  # in the order in which they are learnt; relative paths start from this file's folder"
    for source, task in tasks:
        yield f"    # {_samples(task)}; {_scoring(task)}"
        yield f"    - name: {_scalar(source.name)}"
        yield f"      path: {_scalar(source.path)}"
        for key, value in source.settings.items():
            why = "  # there is no evaluation file: a tenth is held out and never trained on"
            yield f"      {key}: {_scalar(value)}{why if key == 'eval_fraction' else ''}"


def _train_lines(
    tasks: Sequence[tuple[_Source, Task]], model: ModelConfig, device: Device, ranks: int, lengths: _Lengths
) -> Iterator[str]:
    micro_batch = max(1, min(8, MICRO_BATCH_TOKENS[device.kind] // lengths.max_length))
    least = min(len(task.train) for _, task in tasks)
    micro_batch = min(micro_batch, max(1, least // ranks))
    steps = -(-least // (micro_batch * ranks))
    epochs = max(1, min(MOST_EPOCHS, -(-LEAST_STEPS // steps)))
    rate, why = _learning_rate(model, device, ranks)
    yield "train:"
    yield f"  epochs: {epochs}  # the smallest task has {least} training samples, {_count(steps, 'step')} per epoch"
    most = micro_batch * lengths.max_length
    yield f"  micro_batch_size: {micro_batch}  # samples per rank and forward pass, at most {most} tokens"
    yield f"  learning_rate: {rate}  # {why}"
    fits = "holds the longest sample" if lengths.source <= lengths.max_length else (
        f"the longest sample has {lengths.source}; longer prompts are cut in the middle"
    )  # fmt: skip
    yield f"  max_length: {lengths.max_length}  # tokens ({lengths.counted}); {fits}"
    answers = any(task.kind != "text" for _, task in tasks)
    if answers and lengths.cuts_answers:
        yield f"  max_target_length: {lengths.max_target_length}  # the longest answer has {lengths.answer} tokens"
        yield "  long_answers: cut  # of longer training answers, the start is learnt"
    elif answers:
        yield f"  max_target_length: {lengths.max_target_length}  # holds the longest answer; limits generated ones"
    generates = any(task.kind == "generation" for _, task in tasks)
    if generates and _has_chat_template(model):
        yield "  template: chat  # prompts and answers become the turns of the model's chat template"
    if device.bfloat16 and device.kind == "cuda":
        yield f"  dtype: bfloat16  # {device.name} multiplies it in hardware; master weights stay float32"
    else:
        yield "  dtype: float32  # bfloat16 halves the memory and is slower on most CPUs"


def _learning_rate(model: ModelConfig, device: Device, ranks: int) -> tuple[str, str]:
    if model.name_or_path in BUILTIN_FAMILIES:
        return "1e-3", "for the tiny model; 1e-5 to 1e-4 for a pretrained one"
    if _is_large(model, device, ranks):
        return "3e-4", "usual for adapters"
    if _family(model) == "encoder-decoder":
        return "1e-4", "MIGU's, for T5"
    return "2e-5", "usual for pretrained models"


def _samples(task: Task) -> str:
    held_out = {"held-out": "held out", "train": "the same ones for evaluation"}.get(task.scored_on, task.scored_on)
    return f"{len(task.train)} training samples, {len(task.evaluation)} {held_out}"


def _scoring(task: Task) -> str:
    if task.kind == "text":
        return "plain text, scored by perplexity"
    if task.labels:
        return f"labels {listed(map(show, task.labels), SHOWN_LABELS)}, scored by their likelihood"
    return "free answers, generated and scored by ROUGE-L"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _scalar(value: Any) -> str:
    """A value as YAML on one line: bare if it is read as itself, else in quotes."""
    if isinstance(value, str):
        bare = re.fullmatch(r"[./]*\w[\w ./:-]*", value) is not None and value.isprintable()
        if not (bare and parse_yaml(value, "value") == value):
            return json.dumps(value, ensure_ascii=not value.isprintable())
    return str(value)


def _quoted(path: Path) -> str:
    """A path as a shell reads it."""
    import shlex

    return shlex.quote(str(path))
