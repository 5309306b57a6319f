"""A run's inputs: digests of its data, base model and tokenizer, and where they are. Imports nothing heavy.

The content of the inputs is part of a run's identity, their paths are not: a run can resume after the whole project was
moved, but not with other data at the same path. Digests cover the samples that the run uses, in order, so a file may be
rewritten, even in another format, as long as it has the same samples; those beyond `stream.max_train_samples` are
ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
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
from cl_dist.tasks.formats.format import Own, OwnSettings, paths_of, with_paths
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
"""Settings that say where inputs are and how to read them. On resume they may differ, and so may the formats' own
settings (`config.formats.format_inputs`), because the digests identify what was read."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class SplitDigest:
    """Digest of the samples of a split."""

    samples: int
    """Number of samples that are used."""
    sha256: str
    """Digest of all samples in order: input, output and references."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class TaskDigest:
    """Digest of a task's samples."""

    train: SplitDigest
    """Samples that the task is trained on."""
    evaluation: SplitDigest
    """Samples that the task is scored on."""
    answers: str
    """SHA-256 of the task's kind and labels; labels may have been inferred from samples that are not used otherwise."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class ModelDigest:
    """Digests of the files of a model or a tokenizer."""

    source: str
    """Where the files were: a folder, a Hugging Face id, or a built-in model's name. Not compared."""
    revision: str | None = None
    """Commit on the Hugging Face Hub, if the files came from there. Not compared, because the files are."""
    files: dict[str, str]
    """SHA-256 by file name; for a built-in model, of its name and seed."""


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class Inputs:
    """Everything that a run reads."""

    data: dict[str, TaskDigest]
    """By task name."""
    base_model: ModelDigest
    """Weights and configuration."""
    tokenizer: ModelDigest
    """Vocabulary, special tokens and chat template."""
    places: dict[str, str] = dataclasses.field(default_factory=dict)
    """Paths of the inputs relative to the run folder, by setting (`input_places`). Not compared."""
    general: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of the harness's task files below `eval.general.include_path`, by name."""
    rouge_tokenizer: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of the files in the folder `eval.rouge_tokenizer_path`, by name."""
    plugins: dict[str, str] = dataclasses.field(default_factory=dict)
    """SHA-256 of the Python files of the recipe's plugins, by name. A difference on resume is only logged."""


def read_inputs(recipe: Recipe, tasks: Sequence[Task]) -> Inputs | None:
    """Digest the inputs of a recipe; None if the model has not been downloaded from the Hub yet.

    Reads all of a model's weights, unless their digest is cached (`state.digests`). Raises `BadInput` for a file that
    cannot be read.
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
    """The same model and tokenizer with other tasks: the inputs as another rank has read them."""
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
    """The fields of a sample that differ from their defaults, so that a new field does not change older digests."""
    values = ((field, getattr(example, field.name)) for field in _FIELDS)
    return [[field.name, value] for field, value in values if value != field.default]


def _model_digest(place: ModelPlace, recipe: Recipe, patterns: Sequence[str]) -> ModelDigest:
    if place.folder is None:
        assert recipe.model.name_or_path in BUILTIN_FAMILIES
        # A built-in model's weights are drawn from the seed.
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
    if written is None or not Path(written).is_dir():  # a Hugging Face id, which is compared as a setting
        return {}
    place = ModelPlace(Path(written), None, None)
    return file_digests(place.files(TOKENIZER_FILES, code=False))


def refuse_other_inputs(before: Inputs, now: Inputs, tasks: Sequence[Task], folder: Path) -> None:
    """Raise `BadInput` if the run in `folder` was started with other inputs than `now`."""
    changes = input_changes(before, now, tasks)
    if changes:
        raise BadInput(
            f"--resume: the run in {folder} was started with other inputs: "
            f"{listed(changes, _SHOWN_CHANGES, separator='; ')}; "
            "restore the old ones, or start anew with --fresh or another output_dir"
        )


def input_changes(before: Inputs, now: Inputs, tasks: Sequence[Task] = ()) -> list[str]:
    """One phrase for each input that has changed; `tasks` provide the paths of the current data files."""
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
    """A sentence about plugins whose source has changed, or None. A run may resume with a repaired plugin."""
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
            yield f"{_called(name)} is {'new' if name in now else 'gone'}"
            continue
        old, new = before[name], now[name]
        places = origins.get(name, ("", ""))
        splits = (("training", old.train, new.train), ("evaluation", old.evaluation, new.evaluation))
        changed = [
            f"the {what} data of {_called(name)}{f' ({place})' if place else ''} changed: {_counts(a, b)}"
            for place, (what, a, b) in zip(places, splits, strict=True)
            if a != b
        ]
        if not changed and old.answers != new.answers:
            changed = [f"the labels of {_called(name)} changed"]
        yield from changed


def _called(name: str) -> str:
    """A task, or a method's data set (`tasks.stream.load_method_data`)."""
    return name if name.startswith("method.") else f"task {name!r}"


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


def input_places(recipe: Recipe, run: Path) -> dict[str, str]:
    """The path of every folder and file that the recipe reads, relative to the run folder `run`, by setting."""
    start = run.resolve()
    return {key: os.path.relpath(path.resolve(), start) for key, path in _paths(recipe).items() if path.exists()}


def moved_inputs(recipe: Recipe, places: Mapping[str, str], run: Path) -> Recipe:
    """The recipe with the paths of inputs that were moved together with the run folder.

    A path that no longer exists is replaced by the same path relative to the run folder, if that exists. Whether it is
    the same content is checked by digest.
    """
    found = {}
    for key, path in _paths(recipe).items():
        moved = Path(os.path.normpath(run.resolve() / places[key])) if key in places else path
        if not path.exists() and moved.exists():
            found[key] = str(moved)
    return _with_paths(recipe, found)


def _paths(recipe: Recipe) -> dict[str, Path]:
    """The absolute paths in a resolved recipe, by setting; the others are relative to `stream.root`."""
    stream, general = recipe.stream, recipe.eval.general
    written = {
        "stream.root": stream.root,
        "eval.general.include_path": None if general is None else general.include_path,
        "eval.rouge_tokenizer_path": recipe.eval.rouge_tokenizer_path,
        **{f"stream.tasks[{position}].path": task.path for position, task in enumerate(stream.tasks)},
        **{f"{key}.{name}": path for key, owner in _owners(recipe) for name, path in paths_of(owner).items()},
    }
    paths = {key: Path(path) for key, path in written.items() if path is not None and os.path.isabs(path)}
    name = recipe.model.name_or_path
    return paths if name in BUILTIN_FAMILIES else {**paths, "model.name_or_path": Path(os.path.expanduser(name))}


def _owners(recipe: Recipe) -> Iterator[tuple[str, OwnSettings]]:
    """The settings that belong to formats, each with the prefix of their keys."""
    yield from (("stream", settings) for settings in recipe.stream.shared)
    yield from ((f"stream.tasks[{position}]", task.reader) for position, task in enumerate(recipe.stream.tasks))


def _moved(settings: Own, key: str, paths: Mapping[str, str]) -> Own:
    """A format's settings with those of `paths` whose keys start with `key`."""
    return with_paths(settings, {n: paths[f"{key}.{n}"] for n in paths_of(settings) if f"{key}.{n}" in paths})


def _with_paths(recipe: Recipe, paths: Mapping[str, str]) -> Recipe:
    stream, general = recipe.stream, recipe.eval.general
    tasks = tuple(
        replace(
            task,
            path=paths.get(f"stream.tasks[{position}].path", task.path),
            reader=_moved(task.reader, f"stream.tasks[{position}]", paths),
        )
        for position, task in enumerate(stream.tasks)
    )
    stream = replace(
        stream,
        tasks=tasks,
        root=paths.get("stream.root", stream.root),
        shared=tuple(_moved(settings, "stream", paths) for settings in stream.shared),
    )
    if general is not None:
        general = replace(general, include_path=paths.get("eval.general.include_path", general.include_path))
    model = replace(recipe.model, name_or_path=paths.get("model.name_or_path", recipe.model.name_or_path))
    tokenizer = paths.get("eval.rouge_tokenizer_path", recipe.eval.rouge_tokenizer_path)
    evaluation = replace(recipe.eval, general=general, rouge_tokenizer_path=tokenizer)
    return replace(recipe, stream=stream, model=model, eval=evaluation)
