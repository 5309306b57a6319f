"""Records what a process does to the files below a folder, in order.

Everything is really done. Syncs and renames are noted as they happen. All else (writes, new names, deletions) is found
by looking at the folder before each of them and at each mark, whoever did it and however: what happens between two
looks may reach the disk in any order anyway. Nothing gets past that, but a rename that does not go through `os`, which
is an error here.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cl_dist.state.ledger import Ledger
from cl_dist.state.manifest import Manifest

Event = dict[str, Any]
"""`do` says what: `root` (`inode`); `link` (`folder`, `name`, `inode`; None where the name goes); `rename` (`links`,
made at once); `write` (`inode`, `content`); `sync` (`inode`, `site`); `mark` (`state`: promised from here on)."""

PASSING = {"logs", ".lock", "log.jsonl"}
"""Files of a run that may be lost: heartbeats and stacks, the lock, the log."""


class Recorder:
    """Writes one JSON line per event to `log`, and the content of every version of a file below its folder.

    Args:
        root: The folder that is watched. Its own name counts as safe.
        log: The file, in a folder that is not watched.
    """

    def __init__(self, root: Path, log: Path) -> None:
        self.machine = 0
        """The machine that is being recorded: a sync makes only its own machine's writes safe."""
        self._root, self._contents = root, log.parent
        self._log = log.open("w", encoding="utf-8")
        self._names: dict[tuple[int, str], int] = {}
        self._versions: dict[int, tuple[tuple[int, ...], str]] = {}
        self._held = {root.stat().st_ino: os.open(root, os.O_PATH)}
        self._fsync, self._rename, self._replace = os.fsync, os.rename, os.replace
        self._add(do="root", inode=root.stat().st_ino)

    def start(self) -> None:
        """Start recording."""
        os.fsync, os.rename, os.replace = self._syncing, self._renaming(os.rename), self._renaming(os.replace)

    def stop(self) -> None:
        """Stop recording."""
        os.fsync, os.rename, os.replace = self._fsync, self._rename, self._replace
        self._log.close()
        for descriptor in self._held.values():
            os.close(descriptor)

    def mark(self, state: Any) -> None:
        """Record that `state` is promised from now on."""
        self._look()
        self._add(do="mark", state=state)

    def _add(self, **event: Any) -> None:
        self._log.write(json.dumps(event) + "\n")
        self._log.flush()

    def _syncing(self, file: Any) -> None:
        self._look()
        self._fsync(file)
        inode = os.fstat(file if isinstance(file, int) else file.fileno()).st_ino
        if inode in self._held:
            self._add(do="sync", inode=inode, site=_site(sys._getframe(1)), machine=self.machine)

    def _renaming(self, rename: Any) -> Any:
        def renaming(source: Any, target: Any) -> None:
            self._look()
            rename(source, target)
            old, new = self._place(Path(source)), self._place(Path(target))
            if old in self._names:
                inode = self._names.pop(old)
                self._names[new] = inode
                self._add(do="rename", links=[[*old, None], [*new, inode]])

        return renaming

    def _place(self, path: Path) -> tuple[int, str]:
        return path.parent.stat().st_ino, path.name

    def _look(self) -> None:
        """Record the changes in the folder since the last call."""
        now = dict(self._entries(self._root, self._root.stat().st_ino))
        gone = self._names.keys() - now.keys()
        for place, (path, inode) in now.items():
            known = self._names.get(place)
            if known != inode:
                moved = [old for old in gone if self._names[old] == inode]
                assert not moved, f"{path} was renamed past the recorder"
                if inode not in self._held:  # held open, so that its inode number is not reused during the recording
                    self._held[inode] = os.open(path, os.O_PATH)
                self._names[place] = inode
                self._add(do="link", folder=place[0], name=place[1], inode=inode, is_folder=path.is_dir())
            if not path.is_dir():
                self._look_into(path, inode)
        for place in gone:
            del self._names[place]
            self._add(do="link", folder=place[0], name=place[1], inode=None)

    def _entries(self, folder: Path, inode: int) -> Iterator[tuple[tuple[int, str], tuple[Path, int]]]:
        """Everything below a folder, a folder before what is in it: its place, and where and what it is."""
        for path in sorted(folder.iterdir()):
            if path.name not in PASSING:
                found = path.lstat()
                yield (inode, path.name), (path, found.st_ino)
                if stat.S_ISDIR(found.st_mode):
                    yield from self._entries(path, found.st_ino)

    def _look_into(self, path: Path, inode: int) -> None:
        found = path.stat()
        version = (found.st_size, found.st_mtime_ns, found.st_ctime_ns)
        before = self._versions.get(inode)
        if before is not None and before[0] == version and found.st_size > 1 << 16:
            return
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self._versions[inode] = version, digest
        if before is None or before[1] != digest:
            (self._contents / digest).write_bytes(content)
            self._add(do="write", inode=inode, content=digest, machine=self.machine)


def _site(frame: FrameType | None) -> str:
    """The function that asked for a sync, and the line in which it did: `state/scores.py _append: sync(self.path)`."""
    while frame is not None and (frame.f_code.co_name == "sync" and frame.f_code.co_filename.endswith("atomic.py")):
        frame = frame.f_back
    assert frame is not None
    path = Path(frame.f_code.co_filename)
    line = path.read_text(encoding="utf-8").splitlines()[frame.f_lineno - 1].partition("  #")[0].strip()
    return f"{path.parent.name}/{path.name} {frame.f_code.co_name}: {line}"


@contextmanager
def recorded(root: Path, log: Path) -> Iterator[Recorder]:
    """Record this process inside the block."""
    recorder = Recorder(root, log)
    recorder.start()
    try:
        yield recorder
    finally:
        recorder.stop()


def known(manifest: Manifest) -> list[Any]:
    """What a run has promised to keep."""
    named = [[entry.folder, entry.task, entry.step] for entry in manifest.checkpoints]
    matrix = [list(row) for row in manifest.accuracy_matrix]
    return [manifest.status, manifest.completed, named, matrix, list(manifest.row_under_way)]


def arm(rank: int, root: str, log: str) -> None:
    """Record this rank to its end; everything that its ledger has written counts as promised."""
    recorder = Recorder(Path(root), Path(log))
    recorder.start()

    def marking(name: str) -> None:
        original = getattr(Ledger, name)

        def marked(self: Ledger, *arguments: Any, **named: Any) -> None:
            original(self, *arguments, **named)
            recorder.mark({"known": known(self.manifest), "metrics": name == "write_metrics"})

        setattr(Ledger, name, marked)

    for name in ("replace", "scored", "write_metrics"):
        marking(name)
