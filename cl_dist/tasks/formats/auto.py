"""Data found from `path` alone: a file, a folder of files, a saved or a published data set.

The ending of a file's name says how it is stored, its columns what a record holds. What is found this way is read by
the format that it has; nothing here reads data itself.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cl_dist.config.files import is_folder, is_there
from cl_dist.config.words import did_you_mean, listed, show, show_path
from cl_dist.errors import BadInput
from cl_dist.tasks.formats.files import COMPRESSED, enumerate_names, list_folder, logger, missing
from cl_dist.tasks.formats.format import DEV_NAMES, SPLITS, Format, RawTask, Source
from cl_dist.tasks.formats.held_out import HOLD_OUT
from cl_dist.tasks.formats.huggingface import FILE_ENDINGS, FILE_FORMATS, HuggingFace, is_saved
from cl_dist.tasks.formats.record_files import EXTENSIONS, READERS, extension_of, has_classes
from cl_dist.tasks.formats.text import Text
from cl_dist.tasks.types import ScoredOn

TEXT = ".txt"
PARQUET = ".parquet"
ENDINGS = (*EXTENSIONS, TEXT)
PUBLISHED_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")
"""Owner and name of a data set on the Hugging Face Hub."""
WORDS = {**{split: split for split in ("train", *SPLITS)}, "training": "train", "testing": "test"}
"""What names of files call a split, and its usual name."""
SPLIT_NAME = re.compile(rf"({'|'.join(WORDS)})(?:[-_.].*)?|.+[-_.]({'|'.join(WORDS)})(?:-\d+-of-\d+)?", re.IGNORECASE)
"""The name of a file that says its split: `test.csv`, `train-00000-of-00002.parquet`, `billing_test.csv`."""


class Auto(HuggingFace):
    """Whatever is at the path."""

    name = "auto"
    summary = "found from `path`: a file, a folder, a saved or published data set"
    DETECTS = True

    def is_at(self, path: Path) -> bool:
        """Whether a file or a folder is at the path, or files whose names lack only their endings there."""
        return is_there(path) or bool(with_ending(path))

    def read(self, source: Source) -> RawTask:
        """Read what is at the path."""
        path = self._find(source)
        if path is None:
            return super().read(source)
        found = dataclasses.replace(source, path_in_recipe=str(path))
        if is_folder(path):
            return self._read_folder(found, path)
        if extension_of(path) == PARQUET and has_classes(path):
            return super().read(found)
        if extension_of(path) is not None:
            self._refuse("subset", "streaming", what=f"the file {path}")
            return self.read_files(found, [path], *self._evaluation(source, files_beside(path)))
        if path.suffix.lower() == TEXT:
            return self._as(Text(eval_fraction=self.eval_fraction), found)
        if path.suffix in FILE_FORMATS:
            return super().read(found)
        raise BadInput(
            f"{path} has an unknown ending; allowed: {', '.join((*READERS, TEXT))}; "
            f"{' or '.join(COMPRESSED)} may follow all but .parquet and .txt"
        )

    def _find(self, source: Source) -> Path | None:
        """The file or folder of the task; None for the name of a published data set."""
        written = source.path_in_recipe
        path = source.path() if written is None else source.resolve(written, self.is_at)
        if is_there(path):
            return path
        candidates = with_ending(path)
        if len(candidates) > 1:
            names = listed((file.name for file in candidates), last="or")
            raise BadInput(f"path: {path.name!r} is ambiguous in {path.parent}: name {names}")
        if candidates:
            return candidates[0]
        named = PUBLISHED_NAME.fullmatch(written or "") is not None and path.suffix.lower() not in FILE_ENDINGS
        if named and not is_folder(path.parent):
            return None
        raise absent(path, written)

    def _read_folder(self, source: Source, folder: Path) -> RawTask:
        if is_saved(folder):
            return super().read(source)
        published = recognised(folder)
        if published is not None:
            return self._as(published, source)
        splits = split_files(folder)
        if not splits:  # the library looks into folders below, and knows further kinds of file
            if not any(path.suffix in FILE_FORMATS or extension_of(path) for path in folder.glob("*/**/*")):
                names = enumerate_names(list_folder(folder))
                raise BadInput(f"{folder} has no data files ({', '.join((*READERS, TEXT))}); it has: {names}")
            return super().read(source)
        train = splits.pop("train", None)
        if train is None:
            raise missing(folder / f"train{next(iter(splits.values()))[0].suffix}")
        kind = one_kind(folder, train)
        if kind == TEXT:
            text = Text(eval_fraction=self.eval_fraction)
            self._refuse_own(text, source)
            return text.read_files(source, train, *self._evaluation(source, splits))
        if kind == PARQUET and has_classes(train[0]):
            return super().read(source)
        self._refuse("subset", "streaming", what=f"the files in {folder}")
        evaluation, evaluated = self._evaluation(source, splits)
        if not evaluation and self.eval_fraction is None:
            absent_file = missing(folder / f"{source.eval_split}{train[0].suffix}")
            raise BadInput(f"{absent_file}; {HOLD_OUT}")
        return self.read_files(source, train, evaluation, evaluated)

    def _evaluation(
        self, source: Source, splits: Mapping[str, Sequence[Path]]
    ) -> tuple[Sequence[Path], ScoredOn | None]:
        """The files to evaluate on, and which split they are: the wanted one, or the other, which is logged."""
        dev = next((name for name in DEV_NAMES if name in splits), None)
        found = {"test": splits.get("test", ()), "dev": splits[dev] if dev is not None else ()}
        wanted: ScoredOn = source.eval_split
        other: ScoredOn = "dev" if wanted == "test" else "test"
        chosen = wanted if found[wanted] else other if found[other] else None
        if chosen is None:
            return (), None
        one_kind(found[chosen][0].parent, found[chosen])
        if chosen != wanted:
            logger.warning("task %r has no %s file: evaluating on %s", source.name, wanted, found[chosen][0])
        return found[chosen], chosen

    def _as(self, other: Format, source: Source) -> RawTask:
        """Read with another format, which has none of this one's settings but `eval_fraction`."""
        self._refuse_own(other, source)
        return other.read(source)

    def _refuse_own(self, other: Format, source: Source) -> None:
        """Raise BadInput for a setting that another format does not have."""
        shared = {field.name for field in dataclasses.fields(type(other))}
        own = [field.name for field in dataclasses.fields(Auto) if field.name not in shared]
        self._refuse(*own, what=f"{source.path_in_recipe}, which is in format {other.name},")

    def _refuse(self, *names: str, what: str) -> None:
        """Raise BadInput for a setting that nothing reads for this data."""
        for name in names:
            value = getattr(self, name)
            if value != getattr(Auto, name):
                raise BadInput(f"{name}: {show(value)} is not read for {what}; leave it out")


def with_ending(path: Path) -> list[Path]:
    """The data files whose names are the path's with an ending: `billing` finds `billing.jsonl`."""
    if not path.name or not is_folder(path.parent):
        return []
    return data_files(path.parent, path.name)


def data_files(folder: Path, stem: str) -> list[Path]:
    """The data files of a folder with a name, whose ending may be in capitals."""
    names = {name: name[len(stem) :].lower() for name in list_folder(folder) if name.startswith(stem)}
    return [folder / name for ending in ENDINGS for name in sorted(names) if names[name] == ending]


def absent(path: Path, written: str | None) -> BadInput:
    """The error for a path with nothing at it; `written` is how the recipe gives it."""
    if "://" in (written or ""):
        return BadInput(
            f"path: {show_path(written)} is an address; download the file and name it here, or name a data set of the "
            "Hugging Face Hub as owner/name"
        )
    names = list_folder(path.parent) if is_folder(path.parent) else []
    hint = "; a published data set is named owner/name"
    if any(mark in str(path) for mark in "*?["):
        hint = "; patterns are not expanded: name a file, or a folder of files"
    elif "$" in str(path):
        hint = "; variables of the environment are not replaced: write the path itself, or start it with ~"
    return BadInput(f"{missing(path)}{did_you_mean(path.name, names)}{hint}")


def recognised(folder: Path) -> Format | None:
    """The format of a benchmark, if a folder is certainly in it. Raises BadInput if several claim it."""
    from cl_dist.tasks.formats.catalogue import builtin_formats  # which imports this module

    found = [cls for cls in builtin_formats().values() if cls.recognises(folder)]
    if len(found) > 1:
        raise BadInput(
            f"{folder} can be read in several formats; name one: format: {listed((c.name for c in found), last='or')}"
        )
    return found[0]() if found else None


def stem_of(path: Path) -> str:
    """The name of a data file without its ending."""
    extension = extension_of(path)
    return path.name[: -len(extension)] if extension is not None else path.stem


def files_beside(path: Path) -> dict[str, list[Path]]:
    """The evaluation files next to a training file, by split: `billing.test.csv` next to `billing.csv` or
    `billing.train.csv`, `billing_test.csv` next to `billing_train.csv`.
    """
    stem = stem_of(path)
    named = re.fullmatch(r"(|.*([-_.]))train", stem, re.IGNORECASE)
    start = f"{stem}." if named is None else named[1]
    found: dict[str, list[Path]] = {}
    for name in sorted(list_folder(path.parent)):
        file = path.parent / name
        if extension_of(file) and stem_of(file).startswith(start):
            split = stem_of(file)[len(start) :].lower()
            if split in SPLITS:
                found.setdefault(split, []).append(file)
    return {split: found[split] for split in SPLITS if split in found}


def split_files(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by the split that their names say; files that say none are training data if no file
    says `train`.

    Of `train.csv` and `train-2.csv`, only the first one counts: a plain name is the whole split.
    """
    splits: dict[str, list[Path]] = {}
    unnamed: list[Path] = []
    for name in sorted(list_folder(folder)):
        path = folder / name
        if name.startswith((".", "_")) or is_folder(path) or not (extension_of(path) or path.suffix.lower() == TEXT):
            continue
        match = SPLIT_NAME.fullmatch(stem_of(path))
        split = None if match is None else WORDS[(match[1] or match[2]).lower()]
        (unnamed if split is None else splits.setdefault(split, [])).append(path)
    left = list[Path]()
    for split, files in splits.items():
        splits[split] = [file for file in files if WORDS.get(stem_of(file).lower()) == split] or files
        left += [file for file in files if file not in splits[split]]
    if unnamed and "train" not in splits:
        splits["train"] = unnamed
    else:
        left += unnamed
    if left:
        logger.warning("%s: not read: %s", folder, enumerate_names(file.name for file in left))
    return splits


def one_kind(folder: Path, files: Sequence[Path]) -> str:
    """The kind of the files of one split, the ending of their names without compression. Raises BadInput if it differs,
    or if a file is there twice, plain and compressed.
    """
    kinds = {f".{(extension_of(file) or TEXT).split('.')[1]}" for file in files}
    stems = [stem_of(file) for file in files]
    if len(kinds) > 1 or len(set(stems)) < len(stems):
        names = enumerate_names(file.name for file in files)
        raise BadInput(
            f"{folder} is ambiguous: it has {names}; name one file as `path`, or leave files of one kind there"
        )
    return kinds.pop()
