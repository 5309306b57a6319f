"""`cl-dist init`: writes a recipe for the user's own data, with the reasons for each choice as comments."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.cli.parser import Help
from cl_dist.cli.ranks import without_notices
from cl_dist.cli.recipe_text import (
    DEFAULT_MODEL,
    Source,
    count,
    find_device,
    measure,
    quoted,
    recipe_text,
    samples_of,
    scoring_of,
)
from cl_dist.cli.run import check_stream_and_model
from cl_dist.config.boundary import refusing
from cl_dist.config.files import expand, is_file, is_folder, is_there
from cl_dist.config.load import SUFFIXES, check_recipe
from cl_dist.config.schema import BUILTIN_FAMILIES, ModelConfig
from cl_dist.config.words import listed, show, show_path
from cl_dist.config.yaml_text import parse_yaml
from cl_dist.errors import BadInput
from cl_dist.progress import waiting
from cl_dist.state.atomic import advising, write_text
from cl_dist.tasks.formats.format import EmptyAnswers
from cl_dist.tasks.types import Task

HELD_OUT = 0.1
"""`eval_fraction` of a task without evaluation data."""
_EPILOG = """\
examples:
  cl-dist init my.yaml --data billing.jsonl shipping.jsonl
  cl-dist init my.yaml --data tickets.csv --input question --output reply
  cl-dist init my.yaml --data *.jsonl --model HuggingFaceTB/SmolLM2-135M

Each PATH is one task, in the order in which the model learns them: a file, a folder, or a data set of the Hugging Face
Hub (owner/name). docs/data.md says what is read.
"""


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `init`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "init",
        parents=[common],
        description="Write a recipe for your data that runs on this machine, and check the data.",
        epilog=_EPILOG,
        formatter_class=Help,
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
        with waiting("reading the data"), without_notices():
            sources = _sources(arguments, target.absolute().parent)
            tasks, empty_answers = _read_all(sources, model, target)
    device, ranks = find_device()
    with waiting("tokenising the data"):
        lengths = measure(model, [task for _, task in tasks])
    text = recipe_text(target, tasks, model, device, ranks, lengths, empty_answers)

    # As a run reads it, before anything is written.
    settings = parse_yaml(text, str(target))
    settings["method"] = [settings["method"]]
    recipe = check_recipe(settings, target.stem, target.absolute().parent)
    here = replace(recipe, launch=replace(recipe.launch, processes=ranks))
    with without_notices():
        check_stream_and_model(here, target.absolute().parent)
    with advising("nothing was written"):
        write_text(target, text)

    width = max(len(source.name) for source, _ in tasks)
    print(f"wrote {target}: {count(len(tasks), 'task')}, model {model.name_or_path}, method migu\n")
    for source, task in tasks:
        print(f"  {source.name:<{width}}  {samples_of(task)}; {scoring_of(task)}")
    if empty_answers == "skip":
        print("  Records without an answer are skipped (stream.empty_answers); cl-dist data counts them.")
    print(f"\nNext:\n  cl-dist data {quoted(target)}  shows what the model will read\n", end="")
    print(f"  cl-dist run {quoted(target)}   trains it and prints a table of scores")
    return 0


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


def _sources(arguments: Namespace, folder: Path) -> list[Source]:
    """The tasks that the paths make. Evaluation files that lie beside a training file belong to its task."""
    from cl_dist.tasks.formats.auto import files_beside

    given = [expand(word, "--data") for word in arguments.data]
    found = [files for path in given if is_file(path) for files in files_beside(path).values()]
    beside = {file.absolute() for files in found for file in files}
    settings = {"input_field": arguments.input, "output_field": arguments.output}
    settings = {key: value for key, value in settings.items() if value is not None}
    sources: list[Source] = []
    for word, path in zip(arguments.data, given, strict=True):
        if path.absolute() in beside:
            continue
        name = _unused(_task_name(path), [source.name for source in sources])
        sources.append(Source(name, _path_from(folder, path, word), settings))
    return sources


def _task_name(path: Path) -> str:
    """A task's name made of a path's: `Größe 2.jsonl.gz` is `Grosse-2`; `billing/train.csv` is `billing`."""
    stem = re.sub(r"(\.(jsonl|json|csv|tsv|parquet|arrow|txt|gz|zst))+$", "", path.name, flags=re.IGNORECASE)
    if re.fullmatch(r"train|data|", stem, re.IGNORECASE):
        stem = path.absolute().parent.name
    stem = re.sub(r"(?<=.)[-_.]train$", "", stem, flags=re.IGNORECASE).replace("ß", "ss")
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


def _read_all(
    sources: Sequence[Source], model: ModelConfig, target: Path
) -> tuple[list[tuple[Source, Task]], EmptyAnswers]:
    """Read all tasks, and say what is done with empty answers: records without one are skipped if there are any."""
    empty_answers: EmptyAnswers = "error"
    try:
        tasks = [_read(source, model, target) for source in sources]
    except BadInput as error:
        if "stream.empty_answers" not in str(error):
            raise
        empty_answers = "skip"
        tasks = [_read(source, model, target, empty_answers) for source in sources]
    given = sources[0].settings
    if given and not any(given.items() <= source.settings.items() for source, _ in tasks):
        names = listed(map(show, given.values()), last="and")
        raise BadInput(f"--input, --output: none of the tasks has {names}, and all can be read without; leave them out")
    return tasks, empty_answers


def _read(
    source: Source, model: ModelConfig, target: Path, empty_answers: EmptyAnswers = "error"
) -> tuple[Source, Task]:
    """Read one task as a run would; without evaluation data, some of its samples are held out.

    The names of fields count for the tasks that have them.
    """
    try:
        task = _load(source, model, target, empty_answers)
    except BadInput as error:
        held_out = _holding_out(source)
        try:
            return held_out, _load(held_out, model, target, empty_answers)
        except BadInput:
            if source.settings and any(sign in str(error) for sign in ("no column", "no field")):
                with suppress(BadInput):
                    return _read(replace(source, settings={}), model, target, empty_answers)
            other = any(sign in str(error) for sign in ("no column", "no field")) and not source.settings
            hint = "; cl-dist init takes their names as --input and --output" if other else ""
            raise BadInput(f"{error}{hint}") from None
    if task.scored_on != "train":
        return source, task
    held_out = _holding_out(source)
    return held_out, _load(held_out, model, target, empty_answers)


def _holding_out(source: Source) -> Source:
    return replace(source, settings={**source.settings, "eval_fraction": HELD_OUT})


def _load(source: Source, model: ModelConfig, target: Path, empty_answers: EmptyAnswers) -> Task:
    folder = target.absolute().parent
    data = {
        "model": {"name_or_path": model.name_or_path},
        "stream": {"tasks": [source.entry], "empty_answers": empty_answers},
        "method": [{"name": "migu"}],
    }
    return check_stream_and_model(check_recipe(data, target.stem, folder), folder)[0]
