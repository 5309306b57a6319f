"""`cl-dist data`: what a recipe reads, and what a model learns from it. Needs the tokenizer, but no weights."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from cl_dist.config.files import cache_folder
from cl_dist.config.load import load_recipe
from cl_dist.config.words import listed
from cl_dist.errors import BadInput
from cl_dist.progress import waiting
from cl_dist.tasks.orders import resolve_order

if TYPE_CHECKING:
    from cl_dist.config.schema import TrainConfig
    from cl_dist.tasks.overview import Lengths, Piece, Sample, TaskOverview

MARKS = ("\u00ab", "\u00bb")
"""Around what is learnt, where there is no colour."""
LEARNT, PLAIN = "\x1b[1;32m", "\x1b[0m"
"""Bold green, and back."""
MOST_SHOWN = 1200
"""Characters of a stretch that are shown."""
MOST_LABELS = 12


def add_commands(commands: Any, common: ArgumentParser, changes: ArgumentParser) -> None:
    """Add `data`; `commands` is argparse's collection of subparsers."""
    parser = commands.add_parser(
        "data",
        parents=[changes, common],
    )
    parser.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a YAML file")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(command=data)


def data(arguments: Namespace) -> int:
    """Read the data, tokenise it, and print what is in it. Raises BadInput, afterwards, if a run would stop there."""
    from cl_dist.tasks.encode import Encoder, label_names
    from cl_dist.tasks.stream import load_stream

    recipe, recipe_dir = load_recipe(arguments.recipe, arguments.changes)
    recipe = resolve_order(recipe, recipe_dir)
    with waiting("reading the data"):
        tasks = load_stream(recipe.stream, recipe_dir, recipe.train)

        from cl_dist.evaluation.outlook import outlook  # from here on, what takes seconds to import
        from cl_dist.models.hub import check_published
        from cl_dist.models.load import load_tokenizer
        from cl_dist.tasks.overview import overview

    check_published(recipe.model, partial(print, file=sys.stderr, flush=True))
    notes: list[str] = []
    with waiting("tokenising the data"):
        tokenizer, objective = load_tokenizer(recipe.model, cache_folder())
        encoder = Encoder(tokenizer, objective, recipe.train, label_names(tasks))
        found = [overview(task, encoder) for task in tasks]
        problems = [each.problem for each in found if each.problem is not None]
        try:
            # The labels of each task are among its own lines already; one note for all tasks is enough.
            notes = [
                notice.text
                for notice in outlook(tasks, encoder, objective, recipe.eval)
                if notice.task is None or notice.about != "labels"
            ]
        except BadInput as error:
            problems.append(str(error))
    if arguments.json:
        print(json.dumps({"tasks": [asdict(each) for each in found], "notes": notes, "problems": problems}, indent=2))
    else:
        colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        print("\n".join(_lines(found, notes, recipe.train, colour)))
    if problems:
        raise BadInput("\n".join(f"a run would stop here: {problem}" for problem in problems))
    return 0


def _lines(found: Sequence[TaskOverview], notes: Sequence[str], train: TrainConfig, colour: bool) -> Iterator[str]:
    width = max(40, shutil.get_terminal_size().columns)
    for each in found:
        yield from _of_task(each, train)
        for sample in each.samples:
            yield ""
            yield from _of_sample(sample, colour, width)
        yield ""
    how = f"{LEARNT}in green{PLAIN}" if colour else f"between {MARKS[0]} and {MARKS[1]}"
    yield f"What is learnt stands {how}: the loss counts these tokens only."
    for note in notes:
        yield from textwrap.wrap(f"note: {note}", width, subsequent_indent="  ")


def _of_task(each: TaskOverview, train: TrainConfig) -> Iterator[str]:
    unit = "documents" if each.kind == "text" else "samples"
    yield f"{each.name}  {each.kind}"
    yield f"  training    {each.train} {unit} of {each.origins[0]}"
    if each.read_as:
        yield f"  read as     {each.read_as}"
    split = {"train": "the training data itself", "held-out": f"held out of {each.origins[1]}"}.get(each.scored_on)
    yield f"  evaluation  {each.evaluation} {unit} {split or f'of {each.origins[1]} ({each.scored_on} split)'}"
    if each.labels:
        shown = [f"{label} ({count})" for label, count in each.labels.items()]
        yield f"  labels      {listed(shown, MOST_LABELS)}, from the {each.labels_from}"
    yield from _of_lengths("prompts", each.prompts)
    yield from _of_lengths("documents" if each.kind == "text" else "answers", each.answers)
    if each.cut_prompts:
        yield (
            f"  cut         {each.cut_prompts} of {each.train} samples lose text before an answer, to fit "
            f"train.max_length {train.max_length}"
        )
    if each.long_answers:
        what = "cut" if train.long_answers == "cut" else "refused"
        yield (
            f"  too long    {each.long_answers} answers, which are {what} (train.max_target_length "
            f"{train.max_target_length}, train.long_answers)"
        )
    if each.repeated:
        yield f"  repeated    {each.repeated} {unit} are identical to an earlier one"
    if each.seen:
        yield f"  seen        {each.seen} of {each.evaluation} evaluation {unit} are in the training data too"


def _of_lengths(what: str, lengths: Lengths | None) -> Iterator[str]:
    if lengths is not None:
        yield (
            f"  {what:<10}  {lengths.median} tokens in the median, 95 % up to {lengths.most_up_to}, "
            f"longest {lengths.longest}"
        )


def _of_sample(sample: Sample, colour: bool, width: int) -> Iterator[str]:
    yield f"  sample {sample.index}: {sample.tokens} tokens, {sample.targets} learnt"
    text = "".join(_marked(piece, colour) for piece in sample.pieces)
    for line in text.split("\n"):
        # A terminal that shows colours wraps lines itself, and does not count the codes.
        parts = [line] if colour else textwrap.wrap(line, width - 4, drop_whitespace=False)
        yield from (f"  | {part}" for part in parts or [""])


def _marked(piece: Piece, colour: bool) -> str:
    text = piece.text
    if len(text) > MOST_SHOWN:
        half = MOST_SHOWN // 2
        text = f"{text[:half]} [{len(text) - 2 * half} characters] {text[-half:]}"
    text = "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)
    if not piece.learnt:
        return text
    # Colours end at the end of a line, so that a pager shows them.
    return text.replace("\n", f"{PLAIN}\n{LEARNT}").join((LEARNT, PLAIN)) if colour else text.join(MARKS)
