"""What a run has been given: digests of its data, its base model and its tokenizer. Imports nothing heavy.

They belong to a run's identity, the places where they lie do not: a project that was moved is the same, and other data
at the same path is not. Samples are digested as they were read and are used, in their order, so that a file that was
written anew, in another format even, changes nothing while it holds the same samples, nor do samples beyond
`stream.max_train_samples`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from cl_dist.config.plugins import module_names, source_files
from cl_dist.config.schema import BUILTIN_FAMILIES, Recipe
from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.heartbeat import beat
from cl_dist.models.files import MODEL_FILES, TOKENIZER_FILES, ModelPlace, locate_model
from cl_dist.state.digests import file_digests, text_digest
from cl_dist.state.places import input_places
from cl_dist.tasks.types import Example, Task

_STRICT = ConfigDict(extra="forbid")
_SHOWN_CHANGES = 4
_SHOWN_FILES = 3
_FIELDS = dataclasses.fields(Example)

INPUT_SETTINGS = (
    "model.name_or_path",
    "model.gguf_file",
    "stream.root",
    "stream.order",
    "stream.format",
    "stream.tasks[].path",
    "stream.tasks[].format",
    "eval.general.include_path",
    "eval.rouge_tokenizer_path",
)
"""Settings that say where inputs are and how they are read: where digests say what was read, these may differ, and so
may formats' own settings (`config.formats.format_inputs`)."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SplitDigest:
    """The samples of a split."""

    samples: int
    """How many are used."""
    sha256: str
    """Of all of them, in order: input, output and references."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TaskDigest:
    """The samples of a task."""

    train: SplitDigest
    """Samples that it is trained on."""
    evaluation: SplitDigest
    """Samples that it is scored on."""
    answers: str
    """SHA-256 of its kind and its labels, which may be inferred from samples that are not used otherwise."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelDigest:
    """Files of a model or a tokenizer."""

    source: str
    """Where they were: a folder, a Hugging Face id, or a built-in model's name. Not compared."""
    revision: str | None = None
    """Commit of the Hugging Face Hub, where they came from there. Not compared: the files are."""
    files: dict[str, str]
    """SHA-256 by file name; of a built-in model that of its name and seed."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Inputs:
    """Everything that a run has read."""

    data: dict[str, TaskDigest]
    """By task."""
    base_model: ModelDigest
    """Weights and configuration."""
    tokenizer: ModelDigest
    """Vocabulary, special tokens and chat template."""
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    """Where they are, relative to the run folder, by setting (`state.places`). Not compared."""
    general: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of the harness's task files below `eval.general.include_path`, by name."""
    rouge_tokenizer: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of the files in the folder `eval.rouge_tokenizer_path`, by name."""
    plugins: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of the Python files of the recipe's plugins, by name. A run that goes on with others says so."""


def read_inputs(recipe: Recipe, tasks: Sequence[Task]) -> Inputs | None:
    """Digest what a recipe names; None where the model is on the Hub and its files are not on this machine yet.

    A model's weights are read whole, unless they were before (`state.digests`). Raises `BadInput` where a file cannot
    be read.
    """
    beat("digesting data and base model", opaque=True)
    place = locate_model(recipe.model)
    if place is None:
        return None
    return Inputs(
        data=_data_digests(tasks),
        base_model=_model_digest(place, recipe, MODEL_FILES),
        tokenizer=_model_digest(place, recipe, TOKENIZER_FILES),
        places=input_places(recipe, Path(recipe.output_dir)),
        general=_general_digests(recipe),
        rouge_tokenizer=_rouge_tokenizer_digests(recipe),
        plugins=file_digests(source_files(module_names(recipe.plugins, recipe.classes))),
    )


def with_data(inputs: Inputs, tasks: Sequence[Task]) -> Inputs:
    """The same model and tokenizer with other tasks: what another rank has read."""
    return dataclasses.replace(inputs, data=_data_digests(tasks))


def _data_digests(tasks: Sequence[Task]) -> dict[str, TaskDigest]:
    return {task.name: _task_digest(task) for task in tasks}


def _task_digest(task: Task) -> TaskDigest:
    return TaskDigest(
        train=_split_digest(task.train),
        evaluation=_split_digest(task.evaluation),
        answers=text_digest([task.kind, list(task.labels)]),
    )


def _split_digest(examples: Sequence[Example]) -> SplitDigest:
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps(_plain(example), default=dataclasses.asdict, separators=(",", ":")).encode() + b"\n")
    beat()
    return SplitDigest(samples=len(examples), sha256=digest.hexdigest())


def _plain(example: Example) -> list[object]:
    """A sample's own values; fields that later releases add count where a sample has them."""
    values = ((field, getattr(example, field.name)) for field in _FIELDS)
    return [[field.name, value] for field, value in values if value != field.default]


def _model_digest(place: ModelPlace, recipe: Recipe, patterns: Sequence[str]) -> ModelDigest:
    if place.folder is None:
        assert recipe.model.name_or_path in BUILTIN_FAMILIES
        # Its weights are drawn from the seed.
        drawn = [recipe.train.seed] if patterns is MODEL_FILES else []
        files = {"builtin": text_digest([recipe.model.name_or_path, *drawn])}
    else:
        files = file_digests(place.files(patterns, code=recipe.model.trust_remote_code))
    return ModelDigest(source=recipe.model.name_or_path, revision=place.revision, files=files)


def _general_digests(recipe: Recipe) -> dict[str, str]:
    general = recipe.eval.general
    if general is None or general.include_path is None:
        return {}
    folder = Path(general.include_path)
    found = (path for path in folder.rglob("*") if path.suffix in (".yaml", ".yml", ".py") and path.is_file())
    return file_digests((path.relative_to(folder).as_posix(), path) for path in found)


def _rouge_tokenizer_digests(recipe: Recipe) -> dict[str, str]:
    written = recipe.eval.rouge_tokenizer_path
    if written is None or not Path(written).is_dir():  # a Hugging Face id, which is compared as it is written
        return {}
    place = ModelPlace(Path(written), None, None)
    return file_digests(place.files(TOKENIZER_FILES, code=False))


def refuse_other_inputs(before: Inputs, now: Inputs, tasks: Sequence[Task], folder: Path) -> None:
    """Raise `BadInput` where what the run in `folder` was given is not what lies there now."""
    changes = input_changes(before, now, tasks)
    if changes:
        raise BadInput(
            f"--resume: the run in {folder} was given other inputs: {listed(changes, _SHOWN_CHANGES, separator='; ')}; "
            "put back what was there, or start anew with --fresh or another output_dir"
        )


def input_changes(before: Inputs, now: Inputs, tasks: Sequence[Task] = ()) -> list[str]:
    """What has changed, a phrase each; `tasks` say in which file the data of today lies."""
    return [
        *_data_changes(before.data, now.data, {task.name: task.origins for task in tasks}),
        *_file_changes("the base model", before.base_model, now.base_model),
        *_file_changes("the tokenizer", before.tokenizer, now.tokenizer),
        *_named_changes("the harness's task files changed (eval.general.include_path", before.general, now.general),
        *_named_changes(
            "ROUGE-L's tokenizer changed (eval.rouge_tokenizer_path", before.rouge_tokenizer, now.rouge_tokenizer
        ),
    ]


def plugin_changes(before: Inputs, now: Inputs) -> str | None:
    """A sentence about plugins whose source is not what it was; None: it is. A run may go on with a repaired one."""
    names = {*before.plugins, *now.plugins}
    changed = sorted(name for name in names if before.plugins.get(name) != now.plugins.get(name))
    if not changed:
        return None
    return f"{', '.join(changed)}: the source of this plugin has changed since the run was last started"


def _data_changes(
    before: Mapping[str, TaskDigest], now: Mapping[str, TaskDigest], origins: Mapping[str, tuple[str, str]]
) -> Iterator[str]:
    for name in dict.fromkeys([*before, *now]):
        if name not in before or name not in now:
            yield f"task {name!r} is {'new' if name in now else 'gone'}"
            continue
        old, new = before[name], now[name]
        places = origins.get(name, ("", ""))
        splits = (("training", old.train, new.train), ("evaluation", old.evaluation, new.evaluation))
        changed = [
            f"the {what} data of task {name!r}{f' ({place})' if place else ''} changed: {_counts(a, b)}"
            for place, (what, a, b) in zip(places, splits, strict=True)
            if a != b
        ]
        if not changed and old.answers != new.answers:
            changed = [f"the labels of task {name!r} changed"]
        yield from changed


def _counts(before: SplitDigest, now: SplitDigest) -> str:
    if before.samples != now.samples:
        return f"{before.samples} samples before, {now.samples} now"
    return f"{now.samples} samples as before, but not the same ones in the same order"


def _file_changes(what: str, before: ModelDigest, now: ModelDigest) -> Iterator[str]:
    changed = sorted(name for name in {*before.files, *now.files} if before.files.get(name) != now.files.get(name))
    if changed:
        moved = ""
        if before.revision != now.revision and before.revision is not None:
            moved = f", commit {before.revision} before and {now.revision or 'none'} now"
        yield f"{what} changed ({now.source}: {listed(changed, _SHOWN_FILES)}{moved})"


def _named_changes(what: str, before: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if changed:
        yield f"{what}: {listed(changed, _SHOWN_FILES)})"
