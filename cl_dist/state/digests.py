"""SHA-256 of files, remembered between runs of a machine: weights of a 7B model are 14 GB, and seldom change."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from cl_dist.errors import BadInput
from cl_dist.heartbeat import beat
from cl_dist.state.atomic import write_json
from cl_dist.state.integrity import file_sha256

WORTH_REMEMBERING = 16 << 20
"""Bytes from which a digest is remembered: smaller files are read in a moment."""
THREADS = 4
"""Files that are read at once; hashing does not hold Python's lock."""
_SETTLED_SECONDS = 2.0
"""Age from which a change of a file shows in its times, whatever the file system's clock resolves."""
_OF_LIBRARIES = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")
"""Entries of JSON files that libraries write and that change nothing."""


def file_digests(files: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """SHA-256 of each file by its name, in hexadecimal; `BadInput` names the file that cannot be read.

    JSON files are digested by what they say, so that another spelling or the release that wrote them changes nothing.
    A large file whose place, size, inode and times of change are those of an earlier run is not read again.
    """
    named = sorted(files)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_file_digest, [path for _, path in named]))
    return {name: digest for (name, _), digest in zip(named, digests, strict=True)}


def text_digest(value: Any) -> str:
    """SHA-256 of a JSON value in a canonical spelling."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        if path.suffix == ".json":
            return _json_digest(path)
        return _remembered(path) if path.stat().st_size >= WORTH_REMEMBERING else file_sha256(path)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror or error}") from error


def _json_digest(path: Path) -> str:
    content = path.read_bytes()
    beat()
    try:
        value = json.loads(content)
        if isinstance(value, dict):
            value = {key: entry for key, entry in value.items() if key not in _OF_LIBRARIES}
        return text_digest(value)
    except (ValueError, RecursionError):  # whoever loads it will say what is wrong with it
        return hashlib.sha256(content).hexdigest()


def _remembered(path: Path) -> str:
    """The digest of a large file, from an earlier run where the system says that the file has not changed since."""
    before = _state(path)
    memory = _memory() / f"{text_digest(before)[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(memory.read_text(encoding="utf-8"))
        if stored["file"] == before:
            return str(stored["sha256"])
    digest = file_sha256(path)
    if _state(path) == before and time.time() - max(before["mtime_ns"], before["ctime_ns"]) / 1e9 > _SETTLED_SECONDS:
        with suppress(Exception):  # a home without room: the next run reads the file again
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, {"file": before, "sha256": digest})
    return digest


def _state(path: Path) -> dict[str, Any]:
    """What changes with the content of a file: `ctime` cannot be set by whoever replaces it."""
    place = os.path.realpath(path)
    found = os.stat(place)
    return {
        "place": place,
        "device": found.st_dev,
        "inode": found.st_ino,
        "size": found.st_size,
        "mtime_ns": found.st_mtime_ns,
        "ctime_ns": found.st_ctime_ns,
    }


def _memory() -> Path:
    """Folder of the digests that are remembered."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cl_dist" / "digests"
