"""The possible contents of a disk after a power loss, for every moment that `recorded_disk` has recorded.

The model follows "All File Systems Are Not Created Equal" (OSDI 2014), with only the guarantees that POSIX gives:

- A file's bytes are safe once the file has been synced. Until then it has the old version, nothing, half of the new
  version or zeros.
- A name in a folder is safe once the folder has been synced. Until then each change may or may not be on disk,
  independently of the others. A rename is one change.

There are too many combinations to try them all. We try: one change lost, one change kept, all changes from some moment
on lost; one file not as written, all files not as written.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from itertools import dropwhile, takewhile
from pathlib import Path
from typing import Any

from tests.state.recorded_disk import Event

Tree = dict[str, str]
"""The files in a folder: name of the content (`Contents`) by relative path."""
Link = tuple[int, str, int | None]


class Contents:
    """Contents by name: the digest of what was written; or `half:SAFE:NEW` or `zeros:SAFE:NEW`, with two digests, for
    new content after a crash. If the new content only extends the safe one, the safe part survives.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def read(self, name: str) -> bytes:
        """The bytes."""
        if ":" not in name:
            return (self._folder / name).read_bytes() if name else b""
        kind, *digests = name.split(":")
        safe, new = map(self.read, digests)
        kept = safe if new.startswith(safe) else b""
        lost = len(new) - len(kept)
        return kept + (new[len(kept) : len(kept) + lost // 2] if kind == "half" else bytes(lost))


@dataclass
class Disk:
    """The state of a disk during the events: what is safe, and what is not safe yet."""

    root: int
    safe: dict[int, dict[str, int]] = field(default_factory=dict)
    """The names in each folder."""
    pending: list[list[Link]] = field(default_factory=list)
    """Changes of names that are not safe yet, in order."""
    versions: dict[int, list[str]] = field(default_factory=dict)
    """The contents that each file may have: the safe one first, the newest last."""
    writers: dict[int, int] = field(default_factory=dict)
    """The machine that wrote each file last."""

    def happen(self, event: Event) -> None:
        """One event."""
        inode = event.get("inode")
        if event["do"] == "link":
            self.pending.append([(event["folder"], event["name"], inode)])
            if inode is not None and event["is_folder"]:
                self.safe.setdefault(inode, {})
            elif inode is not None:
                self.versions.setdefault(inode, [""])
        elif event["do"] == "rename":
            self.pending.append([(link[0], link[1], link[2]) for link in event["links"]])
        elif event["do"] == "write":
            self.versions[event["inode"]].append(event["content"])
            self.writers[event["inode"]] = event["machine"]
        elif event["do"] == "sync":
            self._sync(event["inode"], event["machine"])

    def _sync(self, inode: int, machine: int) -> None:
        if inode in self.versions:
            if self.writers.get(inode, machine) == machine:
                del self.versions[inode][:-1]
            return
        for change in [change for change in self.pending if any(link[0] == inode for link in change)]:
            _apply(self.safe, change)
            self.pending.remove(change)

    def live(self) -> View:
        """What the processes see."""
        return self._view(frozenset(), {})

    def after_a_crash(self) -> Iterator[View]:
        """The possible states after a reboot."""
        count = len(self.pending)
        lost = {frozenset[int](), *(frozenset(range(first, count)) for first in range(count))}
        lost |= {frozenset({one}) for one in range(count)}
        lost |= {frozenset(range(count)) - {one} for one in range(count)}
        for which in sorted(lost, key=sorted):
            yield self._view(which, {})
        unsafe = {inode: found for inode, found in self.versions.items() if len(found) > 1}
        for inode, found in unsafe.items():
            for content in (*found[:-1], *(f"{change}:{found[0]}:{found[-1]}" for change in ("half", "zeros"))):
                yield self._view(frozenset(), {inode: content})
        yield self._view(frozenset(), {inode: found[0] for inode, found in unsafe.items()})

    def _view(self, lost: AbstractSet[int], contents: Mapping[int, str]) -> View:
        folders = {inode: dict(names) for inode, names in self.safe.items()}
        for number, change in enumerate(self.pending):
            if number not in lost:
                _apply(folders, change)
        return View(self.root, folders, {**{inode: found[-1] for inode, found in self.versions.items()}, **contents})


def _apply(folders: dict[int, dict[str, int]], change: Sequence[Link]) -> None:
    for folder, name, inode in change:
        names = folders.setdefault(folder, {})
        if inode is None:
            names.pop(name, None)
        else:
            names[name] = inode


@dataclass
class View:
    """One state of the whole folder."""

    root: int
    folders: dict[int, dict[str, int]]
    contents: dict[int, str]

    def find(self, path: str) -> int | None:
        """The file or folder at a path below the root."""
        inode: int | None = self.root
        for name in Path(path).parts:
            inode = self.folders.get(inode, {}).get(name) if inode is not None else None
        return inode

    def content(self, path: str) -> str | None:
        """A file's content; None if it does not exist."""
        inode = self.find(path)
        return None if inode is None else self.contents.get(inode)

    def tree(self, path: str) -> Tree:
        """All files below a folder; none if it does not exist."""
        inode = self.find(path)
        return {} if inode is None else dict(self._files(inode, ""))

    def _files(self, inode: int, above: str) -> Iterator[tuple[str, str]]:
        for name, below in self.folders.get(inode, {}).items():
            if below in self.contents:
                yield above + name, self.contents[below]
            else:
                yield from self._files(below, f"{above}{name}/")


def read_events(log: Path) -> list[Event]:
    """What was recorded."""
    return [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]


@dataclass(frozen=True)
class Crash:
    """One possible state, and what had been promised when the power failed."""

    moment: int
    """Number of the event before which the power failed."""
    promised: Any
    """The last promise; None before the first."""
    next: Any
    """The promise that is being made."""
    live: View
    found: View


def crashes(events: Sequence[Event], begin: int = 0) -> Iterator[Crash]:
    """Every crash from event `begin` on.

    The moments that count are those before a sync, which makes something safe, and around a promise: what may be lost
    in between may be lost then too.
    """
    disk = Disk(events[0]["inode"])
    promises = [event["state"] for event in events if event["do"] == "mark"] + [None]
    made = 0
    for moment, event in enumerate([*events, {"do": "end"}]):
        if event["do"] == "mark":
            made += 1
        if moment >= begin and event["do"] in ("sync", "mark", "end"):
            promised = promises[made - 1] if made else None
            live = disk.live()
            for found in disk.after_a_crash():
                yield Crash(moment, promised, promises[made], live, found)
        disk.happen(event)


def without(events: Sequence[Event], site: str) -> list[Event]:
    """The events without the syncs of one place in the code."""
    return [event for event in events if event.get("site") != site]


def swapped(events: Sequence[Event], site: str, forwards: bool) -> list[Event]:
    """The events with each sync of one place in the code moved after the next renames, or before the preceding ones."""
    changed = list(events)
    for event in [event for event in events if event.get("site") == site]:
        at = next(number for number, other in enumerate(changed) if other is event)
        places = range(at + 1, len(changed)) if forwards else range(at - 1, -1, -1)
        renames = dropwhile(lambda place: changed[place]["do"] != "rename", places)
        *_, last = takewhile(lambda place: changed[place]["do"] == "rename", renames)
        changed.insert(last, changed.pop(at))
    return changed
