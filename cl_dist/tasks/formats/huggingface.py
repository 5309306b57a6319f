"""Hugging Face data sets: by name, from data files, or saved to disk; read completely, or streamed up to a limit.

`datasets` is imported only when such a task is read, because the import takes longer than all other checks together.
Code that comes with a data set never runs: the supported releases of the library refuse loading scripts.
"""

from __future__ import annotations

import csv
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

from cl_dist.config.files import is_file, is_folder, is_there, refuse_special, refuse_special_below
from cl_dist.config.words import listed, show_path
from cl_dist.errors import BadInput, ClDistError
from cl_dist.hub_request import LOG_IN, ask, gist, meaning, nobody_answered
from cl_dist.tasks.formats.files import (
    COMPRESSED,
    collect,
    enumerate_names,
    is_lone,
    logger,
    missing,
    parse_json,
    read_text,
    split_files,
)
from cl_dist.tasks.formats.format import DEV_NAMES, EmptyAnswers, RawTask, Source, Split
from cl_dist.tasks.formats.held_out import HOLD_OUT, has_evaluation
from cl_dist.tasks.formats.records import Layout, Records

HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""A name that may exist on the hub. Anything else can only be a path."""

FILE_FORMATS = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "json",
    ".jsonl": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
"""The library's name for the format of a data file, by its suffix."""
CSV_SEPARATORS = {".csv": ",", ".tsv": "\t"}
FILE_ENDINGS = (*FILE_FORMATS, ".txt", *COMPRESSED)
"""Endings that no data set's name has: what ends in one is a path to nothing."""

DEEP_JSON = re.compile(rb'(?:[\[{]\s*(?:"[^"]{0,99}"\s*:\s*)?){1000}')
"""A thousand nested lists and objects, each the first item of the one around it."""

DEV_SPLITS = tuple(dict.fromkeys(("validation", *DEV_NAMES)))


class HuggingFace(Records):
    """Data sets that the `datasets` library loads."""

    name = "huggingface"
    summary = "a data set by name, a file or folder, or saved to disk"

    subset: str | None = None
    """Configuration name of a Hugging Face data set."""
    streaming: bool = False
    """Read a Hugging Face data set record by record up to `stream.max_train_samples` and `stream.max_eval_samples`,
    without downloading or converting the rest."""

    def __post_init__(self) -> None:
        """As for all records; and a stream of records is never known as a whole."""
        super().__post_init__()
        if self.streaming and self.eval_fraction is not None:
            raise ValueError(f"eval_fraction: {self.eval_fraction:g} needs all samples; leave out streaming: true")

    def read(self, source: Source) -> RawTask:
        """Read the training split and the test or validation split of a data set."""
        dataset = self._load(source)
        name = source.path_in_recipe or source.name
        if "train" not in dataset:
            raise BadInput(f"data set {name} has no split 'train'; it has: {enumerate_names(dataset)}")
        train, empty = dataset["train"], source.empty_answers
        try:
            with _as_bad_input(f"{name}[train]"):
                columns = self._column_names(train)
                layout = self.layout(columns)
        except BadInput as error:
            raise BadInput(f"{name}[train]: {error}") from error
        labels = None if layout.kind == "text" else label_names(train, self.column_of(layout.answer))
        learnt = self._read_records(train, f"{name}[train]", layout, source.max_train_samples, empty)
        if self.eval_fraction is not None:
            if (other := next((split for split in ("test", *DEV_SPLITS) if split in dataset), None)) is not None:
                raise has_evaluation(self.eval_fraction, f"the split {other!r} of {name}")
            return self.task(learnt, None, source, layout, labels=labels, columns=columns)
        path, evaluation = source.resolve(name), choose_split(dataset, source.eval_split, name)
        origin, most = f"{name}[{evaluation}]", source.max_eval_samples
        scored = self._read_records(dataset[evaluation], origin, layout, most, empty)
        lone = is_file(path) and is_lone(path)
        return self.task(learnt, scored, source, layout, "train" if lone else None, labels, columns)

    def _load(self, source: Source) -> Mapping[str, Any]:
        """The data set's splits by name. Raises BadInput with the library's reason if it cannot be loaded."""
        name = source.path_in_recipe or source.name
        path, subset, streaming = source.resolve(name), self.subset, self.streaming
        unasked = None if is_there(path) else ask_for(name, path)
        import datasets

        if subset is not None and (is_saved(path) or (is_there(path) and not is_folder(path))):
            raise BadInput(f"subset: {subset!r} names a configuration, and what is at {path} has none; leave it out")
        refuse_special(path)
        refuse_special_below(path)
        refuse_deep_json(path)
        with _as_bad_input(name, unasked):
            if is_saved(path):
                refuse_empty_split(path)
                # Its records are memory-mapped, so streaming would gain nothing.
                dataset = datasets.load_from_disk(str(path))
            elif is_there(path) and not is_folder(path):
                builder, files = single_file(path, source.eval_split)
                for file in files.values():
                    refuse_bare_header(Path(file))
                if self.eval_fraction is not None and is_lone(path):
                    del files["test"]
                options = csv_options(sorted({Path(file) for file in files.values()}), self._maybe_read)
                dataset = datasets.load_dataset(builder, data_files=files, streaming=streaming, **options)
            else:
                written = str(path) if is_there(path) else name
                options = csv_options(sorted(path.glob("**/*")), self._maybe_read) if is_there(path) else {}
                dataset = datasets.load_dataset(written, subset, streaming=streaming, **options)
        if not isinstance(dataset, Mapping) and self.eval_fraction is not None:
            return {"train": dataset}
        if not isinstance(dataset, Mapping):
            raise BadInput(f"data set {name} is a single split, without one to evaluate on; {HOLD_OUT}")
        return dataset

    def _column_names(self, split: Any) -> list[str]:
        """The columns of a split; those of its first record if a streamed split does not know them before."""
        if split.column_names is not None:
            return list(split.column_names)
        return list(next(iter(split), {})) if self.DETECTS else []

    @property
    def _maybe_read(self) -> list[str]:
        """Columns that are read whatever the others are, as far as the settings say."""
        return self.columns_of(self.layout(())) if not self.columns else list(self.columns.values())

    def _read_records(self, split: Any, origin: str, layout: Layout, most: int | None, empty: EmptyAnswers) -> Split:
        """The records of a split, with class numbers replaced by names; at most `most` of a streamed one."""
        chosen = split
        if split.column_names is not None:  # those of a streamed split may be unknown before its first record
            self.require_columns(layout, origin, split.column_names)
            chosen = split.select_columns([name for name in self.columns_of(layout) if name in split.column_names])
        with _as_bad_input(origin):  # a streamed split is read only here
            return collect(
                origin,
                enumerate(named_records(chosen, self.column_of(layout.answer))),
                self.converter(layout),
                most=most if self.streaming else None,
                empty=empty,
                answer_name=layout.answer,
            )


def csv_options(paths: list[Path], read: list[str]) -> dict[str, Any]:
    """Options that make the library read every cell of CSV or TSV files as text; none if there are other data files.

    By default it turns `007` into a number, and `None` and `NA` into missing values. Raises BadInput if one of the
    columns in `read` occurs twice.
    """
    files = [path for path in paths if path.suffix in FILE_FORMATS]
    if not files or not all(path.suffix in CSV_SEPARATORS for path in files):
        return {}
    columns: set[str] = set()
    for file in files:
        header = csv_header(file)
        if doubled := [field for field in read if header.count(field) > 1]:
            raise BadInput(f"{file}: column {doubled[0]!r} occurs twice")
        columns.update(header)
    separator = {"sep": CSV_SEPARATORS[files[0].suffix]} if len({file.suffix for file in files}) == 1 else {}
    return {"converters": dict.fromkeys(sorted(columns), str), "keep_default_na": False, **separator}


def csv_header(file: Path) -> list[str]:
    """The names of a file's columns; none if it cannot be read, which the library reports."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            return next(csv.reader(opened, delimiter=CSV_SEPARATORS[file.suffix]), [])
    except (OSError, UnicodeDecodeError, csv.Error):
        return []


def refuse_bare_header(file: Path) -> None:
    """Raise BadInput for a CSV or TSV file without records, since the library's message for it is unclear."""
    if file.suffix not in CSV_SEPARATORS or not is_file(file):
        return
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            lines = [line for line, _ in zip((row for row in csv.reader(opened) if row), range(2), strict=False)]
    except (OSError, UnicodeDecodeError, csv.Error):  # the library reports this
        return
    if len(lines) < 2:
        raise BadInput(f"{file} {'holds no samples: there is only a header' if lines else 'is empty'}")


def refuse_empty_split(folder: Path) -> None:
    """Raise BadInput if a split was saved to disk without records: the library fails on it."""
    for file in sorted(folder.glob("*/state.json")):
        state = parse_json(read_text(file), file)
        if isinstance(state, dict) and state.get("_data_files") == []:
            raise BadInput(f"split {file.parent.name!r} of {folder} holds no samples")


def refuse_deep_json(path: Path) -> None:
    """Raise BadInput for a JSON file, at the path or below it, so deeply nested that the library's parser would crash,
    and the process with it.
    """
    for file in [path] if not is_folder(path) else sorted(path.rglob("*.json*")):
        if file.suffix in (".json", ".jsonl") and is_file(file) and file.stat().st_size:
            with file.open("rb") as opened, mmap(opened.fileno(), 0, access=ACCESS_READ) as data:
                found = DEEP_JSON.search(data)
                if found is not None:
                    line = data[: found.start()].count(b"\n") + 1
                    raise BadInput(f"{file}, line {line}: JSON nested too deeply")


def single_file(path: Path, wanted: str) -> tuple[str, dict[str, str]]:
    """The library's name for a data file's format, and the file of each split.

    The evaluation file is next to the training file, as in format jsonl; if there is none, one file serves for both.
    """
    if path.suffix not in FILE_FORMATS:
        raise BadInput(
            f"{path} has an unknown format; format huggingface reads a folder of data files, or a file that ends in "
            f"{listed(FILE_FORMATS, last='or')}"
        )
    train, evaluation = split_files(path, path.suffix, wanted)
    return FILE_FORMATS[path.suffix], {"train": str(train), "test": str(evaluation)}


def ask_for(name: str, path: Path) -> str | None:
    """Ask the Hub once whether it has a data set, because the library repeats a question that nobody answers for half
    a minute. `path` is where the data set would be if the name were a path.

    Returns why the Hub could not be asked, and what to do; the library then looks into its cache only. Raises BadInput
    if there is no such data set for this user.
    """
    if not HUB_NAME.fullmatch(name) or Path(name).suffix.lower() in FILE_ENDINGS:
        raise missing(path)
    if is_there(Path(name)):  # where the library would look, wherever the recipe is
        raise BadInput(
            f"{missing(path)}; there is a {show_path(name)} in the working folder: name it by its absolute path"
        )
    from huggingface_hub import constants
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError

    hub, nowhere = constants.ENDPOINT, f"there is no folder {path}"
    bring = f"run `hf download {name} --repo-type dataset --local-dir FOLDER` where there is a network and set `path`"
    if constants.is_offline_mode() or os.environ.get("HF_DATASETS_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
        return f"{nowhere}, the cache does not have it, and HF_HUB_OFFLINE forbids asking {hub}; unset it, or {bring}"
    problem = ask(name, "README.md", "dataset")
    if problem is None or isinstance(problem, EntryNotFoundError):  # it is there, without a description
        return None
    if isinstance(problem, GatedRepoError):
        raise BadInput(f"data set {name} is gated: accept its terms at {hub}/datasets/{name}, then {LOG_IN}")
    if isinstance(problem, RepositoryNotFoundError):
        raise BadInput(f"{nowhere}, and no data set {name} on {hub}; check the name; if it is private, {LOG_IN}")
    status = getattr(getattr(problem, "response", None), "status_code", None)
    if not nobody_answered(problem) and (status is None or status < 429):
        raise BadInput(f"data set {name} cannot be loaded: {problem if status is None else meaning(status, hub)}")
    reason = f"{hub} cannot be reached ({gist(problem)})" if status is None else meaning(status, hub)
    # For this process and for its ranks, which would all wait.
    os.environ["HF_DATASETS_OFFLINE"] = "1"
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True
    logger.warning("%s; data set %s is looked for in the cache", reason, name)
    return f"{nowhere}, the cache does not have it, and {reason}; {bring}"


@contextmanager
def _as_bad_input(name: str, unasked: str | None = None) -> Iterator[None]:
    """Turn every error of the library into one sentence.

    For a problem with a data set, its name or the network, it raises exceptions of many unrelated types. `unasked` says
    what is wrong if the Hub could not be asked.
    """
    try:
        yield
    except ClDistError:  # our own errors, and a request to stop
        raise
    except Exception as error:
        # A DatasetGenerationError only says that converting files failed; its cause says why.
        telling = error.__cause__ or error if type(error).__name__ == "DatasetGenerationError" else error
        reason = unasked or " ".join(str(telling).split()) or type(telling).__name__
        raise BadInput(f"data set {name} cannot be loaded: {reason}") from error


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any(is_there(folder / file) for file in ("dataset_dict.json", "state.json"))


def choose_split(dataset: Mapping[str, Any], wanted: str, name: str) -> str:
    """The split to evaluate on: the wanted one, else the other one, which is logged. Raises BadInput without either."""
    dev = next((split for split in DEV_SPLITS if split in dataset), None)
    found = {"test": "test" if "test" in dataset else None, "dev": dev}
    chosen = found[wanted]
    if chosen is not None:
        return chosen
    other = found["test"] or found["dev"]
    if other is None:
        raise BadInput(
            f"data set {name} has no split to evaluate on ('test' or 'validation'); it has: "
            f"{enumerate_names(dataset)}; {HOLD_OUT}"
        )
    logger.warning("data set %s has no %s split: evaluating on %s", name, wanted, other)
    return other


def named_records(split: Any, output_field: str) -> Iterator[dict[str, Any]]:
    """The split's records. Class numbers in a `ClassLabel` output become names; unlabelled ones (-1) become None."""
    names = label_names(split, output_field)
    for record in split:
        if names is not None:
            number = record[output_field]
            record[output_field] = names[number] if number is not None and number >= 0 else None
        yield record


def label_names(split: Any, output_field: str) -> tuple[str, ...] | None:
    """Names of the classes if the output column is a `ClassLabel`; else None."""
    names = getattr((split.features or {}).get(output_field), "names", None)
    return tuple(str(name).strip() for name in names) if names else None
