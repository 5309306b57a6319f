"""Plain text for (continual) pre-training: every non-blank line is a document.

`path` is a folder with `train.txt` (else every other `*.txt`, in the order of their names) and `test.txt` or
`dev.txt`, or the training file `<name>.txt`, with `<name>.test.txt` or `<name>.dev.txt` next to it. Without an
evaluation file, documents are held out (`eval_fraction`), or the training text is used, and the log reports that.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from cl_dist.config.files import is_folder, is_there
from cl_dist.tasks.formats.files import choose_evaluation, evaluation_files, missing, read_text, split_files
from cl_dist.tasks.formats.format import DEV_NAMES, FILES, Format, RawTask, Source, Split
from cl_dist.tasks.formats.held_out import DrawnFraction, draw, has_evaluation
from cl_dist.tasks.types import Example, ScoredOn


class Text(Format):
    """Plain text, one document per line."""

    name = "text"
    summary = "plain text, for pre-training"
    USES = FILES

    eval_fraction: DrawnFraction | None = None
    """For text without an evaluation file: the fraction of the documents that is held out, as for records."""

    @property
    def only_documents(self) -> bool:
        """Always."""
        return True

    def read(self, source: Source) -> RawTask:
        """Read the documents of one task."""
        path = source.path()
        if not is_there(path):
            raise missing(path)
        if is_folder(path):
            train, evaluation = folder_files(path, source.eval_split)
        else:
            train, evaluation = ([file] for file in split_files(path, ".txt", source.eval_split))
        return self.read_files(source, train, evaluation if evaluation != train else [])

    def read_files(
        self, source: Source, train: Sequence[Path], evaluation: Sequence[Path], evaluated: ScoredOn | None = None
    ) -> RawTask:
        """The task in these files. Without evaluation files, documents are held out, or the training data is scored.
        `evaluated` is the split that `evaluation` is, if its name does not show it.
        """
        if self.eval_fraction is not None:
            if evaluation:
                raise has_evaluation(self.eval_fraction, str(evaluation[0]))
            learnt, held_out = draw(read_documents(train), self.eval_fraction, source.seed)
            return RawTask(learnt, held_out, kind="text", evaluated="held-out")
        scored = read_documents(evaluation or train)
        return RawTask(train=read_documents(train), evaluation=scored, kind="text", evaluated=evaluated)


def folder_files(folder: Path, wanted: str) -> tuple[list[Path], list[Path]]:
    """Training and evaluation files of a folder. Raises BadInput if it contains no text for training."""
    candidates = evaluation_files(folder, "", ".txt")
    others = [p for p in sorted(folder.glob("*.txt")) if p.stem not in ("test", *DEV_NAMES)]
    train = [folder / "train.txt"] if is_there(folder / "train.txt") else others
    if not train:
        raise missing(folder / "train.txt")
    if not any(is_there(path) for path in candidates.values()):
        return train, train
    return train, [choose_evaluation(wanted, candidates)]


def read_documents(paths: Sequence[Path]) -> Split:
    """The documents of the files, in order, numbered by line over all files."""
    lines = [line.strip() for path in paths for line in read_text(path).split("\n")]
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line]
    origin = str(paths[0]) if len(paths) == 1 else f"{paths[0].parent} ({len(paths)} files)"
    return Split([Example("", line) for _, line in numbered], origin, [number for number, _ in numbered], "line")
