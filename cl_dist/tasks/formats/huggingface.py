"""Hugging Face data sets: by name, from a folder of data files, or saved to disk.

`datasets` is imported only when such a task is read, since that takes longer than all other checks together. Code that
comes with a data set is never run: the library's supported releases refuse loading scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cl_dist.errors import BadInput, ClDistError
from cl_dist.tasks.formats.files import collect, enumerate_names, logger, make_example, missing
from cl_dist.tasks.formats.source import RawTask, Source, Split

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""A name that may be looked up on the hub: anything else can only be a folder."""

DEV_SPLITS = ("validation", "dev", "eval")


def read(source: Source) -> RawTask:
    """Read the training split and the test or validation split of a data set."""
    dataset = load(source)
    name = source.task.path or source.task.name
    if "train" not in dataset:
        raise BadInput(f"data set {name} has no split 'train'; it has: {enumerate_names(dataset)}")
    evaluation = choose_split(dataset, source.stream.eval_split, name)
    return RawTask(
        train=read_split(dataset["train"], source, f"{name}[train]"),
        evaluation=read_split(dataset[evaluation], source, f"{name}[{evaluation}]"),
        labels=label_names(dataset["train"], source.task.output_field),
    )


def load(source: Source) -> Mapping[str, Any]:
    """The data set's splits by name; BadInput with the library's reason where it cannot be loaded."""
    import datasets

    name = source.task.path or source.task.name
    folder = source.resolve(name)
    if not folder.exists() and not HUB_NAME.fullmatch(name):
        raise missing(folder)
    try:
        if is_saved(folder):
            dataset = datasets.load_from_disk(str(folder))
        else:
            dataset = datasets.load_dataset(str(folder) if folder.exists() else name, source.task.subset)
    except ClDistError:  # a signal that asks to stop
        raise
    # The library reports what is wrong with a data set, its name or the network by exceptions of many unrelated types.
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadInput(f"data set {name} cannot be loaded: {reason}") from error
    if not isinstance(dataset, Mapping):
        raise BadInput(f"data set {name} is a single split; save a DatasetDict with the splits 'train' and 'test'")
    return dataset


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))


def choose_split(dataset: Mapping[str, Any], wanted: str, name: str) -> str:
    """Name of the split to evaluate on: the wanted one, else the other (logged); BadInput where there is neither."""
    dev = next((split for split in DEV_SPLITS if split in dataset), None)
    found = {"test": "test" if "test" in dataset else None, "dev": dev}
    chosen = found[wanted]
    if chosen is None:
        chosen = found["test"] or found["dev"]
        logger.warning("data set %s has no %s split: evaluating on %s", name, wanted, chosen)
    if chosen is None:
        raise BadInput(
            f"data set {name} has no split to evaluate on ('test' or 'validation'); it has: {enumerate_names(dataset)}"
        )
    return chosen


def read_split(split: Any, source: Source, origin: str) -> Split:
    """All records of a split, with class numbers turned into their names."""
    fields = (source.task.input_field, source.task.output_field)
    for field in fields:
        if field not in split.column_names:
            raise BadInput(f"{origin} has no column {field!r}; it has: {enumerate_names(split.column_names)}")
    records = named_records(split.select_columns(list(fields)), fields[1])
    return collect(origin, enumerate(records), partial(make_example, input_field=fields[0], output_field=fields[1]))


def named_records(split: Any, output_field: str) -> Iterator[dict[str, Any]]:
    """The split's records; the output of a `ClassLabel` column becomes its name, an unlabelled one (-1) None."""
    names = label_names(split, output_field)
    for record in split:
        if names is not None:
            number = record[output_field]
            record[output_field] = names[number] if number is not None and number >= 0 else None
        yield record


def label_names(split: Any, output_field: str) -> tuple[str, ...] | None:
    """Names of the classes where the output column is a `ClassLabel`, else None."""
    names = getattr(split.features.get(output_field), "names", None)
    return tuple(names) if names else None
