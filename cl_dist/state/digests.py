"""SHA-256 of files, cached between runs on a machine: the weights of a 7B model are 14 GB and rarely change."""

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

from cl_dist.config.files import cache_folder
from cl_dist.errors import BadInput
from cl_dist.heartbeat import beat
from cl_dist.state.atomic import write_json
from cl_dist.state.integrity import file_sha256

WORTH_CACHING = 16 << 20
"""Size in bytes from which a digest is cached; smaller files are quick to read."""
THREADS = 4
"""Number of files that are read at the same time; hashing releases the GIL."""
_SETTLED_SECONDS = 2.0
"""File systems' clocks are coarse: a file that has just changed might change again and keep its time stamps."""
_OF_LIBRARIES = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash")
"""Entries of JSON files that libraries write and that have no effect."""


def file_digests(files: Iterable[tuple[str, Path]]) -> dict[str, str]:
    """SHA-256 of each file by its name, in hexadecimal. Raises `BadInput` for a file that cannot be read.

    JSON files are digested by their content, so that formatting and the release that wrote them make no difference. A
    large file is not read again if its path, size, inode and modification times are the same as in an earlier run.
    """
    named = sorted(files)
    with ThreadPoolExecutor(THREADS) as pool:
        digests = list(pool.map(_file_digest, [path for _, path in named]))
    return {name: digest for (name, _), digest in zip(named, digests, strict=True)}


def text_digest(value: Any) -> str:
    """SHA-256 of a JSON value in canonical form."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    try:
        if path.suffix == ".json":
            return _json_digest(path)
        return _cached_digest(path) if path.stat().st_size >= WORTH_CACHING else file_sha256(path)
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
    except (ValueError, RecursionError):  # not valid JSON; the code that loads it will report that
        return hashlib.sha256(content).hexdigest()


def _cached_digest(path: Path) -> str:
    """The digest of a large file: from the cache if the file has not changed since, else computed and cached."""
    before = _state(path)
    cache = cache_folder() / "digests"
    entry = cache / f"{text_digest(before)[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        stored = json.loads(entry.read_text(encoding="utf-8"))
        if stored["file"] == before:
            return str(stored["sha256"])
    digest = file_sha256(path)
    # Cache it only if the file cannot have changed while it was read.
    if _state(path) == before and time.time() - max(before["mtime_ns"], before["ctime_ns"]) / 1e9 > _SETTLED_SECONDS:
        with suppress(Exception):  # if the home folder is full, the next run reads the file again
            cache.mkdir(parents=True, exist_ok=True)
            write_json(entry, {"file": before, "sha256": digest})
    return digest


def _state(path: Path) -> dict[str, Any]:
    """What changes whenever a file's content does; unlike `mtime`, `ctime` cannot be set by the user."""
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
