"""Checksums: damage to stored state is detected and reported, and never trained on.

An unreadable file is not a damaged one: a file server that fails today may work tomorrow. A run falls back to an older
state only if a file is missing or its content is not what was written.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cl_dist.errors import ClDistError
from cl_dist.heartbeat import beat
from cl_dist.state.atomic import write_json

_CHUNK_BYTES = 1 << 20
_PAUSES = (0.5, 1.0, 2.0, 4.0)
"""Seconds before each retry after an I/O error, such as a stale file handle or a busy server."""

Result = TypeVar("Result")


class CheckpointDamaged(ClDistError):
    """Stored state is incomplete or differs from what was written; the message names the file."""


class StateUnusable(ClDistError):
    """Stored state may be intact, but this process cannot read or understand it; nothing may be deleted."""


def patiently(path: Path, read: Callable[[], Result]) -> Result:
    """Return what `read` returns, and retry for some seconds if `path` cannot be read.

    Raises `CheckpointDamaged` if the file is missing or a folder, `StateUnusable` if reading keeps failing.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except (FileNotFoundError, NotADirectoryError) as error:
            raise CheckpointDamaged(f"{path} is missing") from error
        except IsADirectoryError as error:
            raise CheckpointDamaged(f"{path} is a folder") from error
        except OSError as error:
            if pause is None:
                reason = error.strerror or " ".join(str(error).split())
                raise StateUnusable(
                    f"{path} cannot be read: {reason}; nothing was deleted, and --resume tries again"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def require_format(path: Path, found: Any, known: int) -> None:
    """Raise `StateUnusable` if a state has a format that this release does not read."""
    if found != known:
        raise StateUnusable(
            f"{path} has format {found}, written by another release of cl_dist; this one reads {known}; nothing was "
            "deleted, and the release that wrote it can --resume the run"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            beat()
    return digest.hexdigest()


def _content_sha256(content: Any) -> str:
    """SHA-256 of a parsed JSON value in canonical form."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path, content: Any) -> None:
    """Write a JSON value with its checksum, atomically and durably. Raises `ValueError` for NaN and infinity."""
    as_parsed = json.loads(
        json.dumps(content, allow_nan=False)
    )  # as it will be read: keys are strings, tuples are lists
    write_json(path, {"sha256": _content_sha256(as_parsed), "content": as_parsed})


def read_sealed(path: Path) -> Any:
    """Read what `write_sealed` wrote.

    Raises `CheckpointDamaged` if the file is missing or has changed, `StateUnusable` if it cannot be read.
    """
    text = patiently(path, path.read_bytes)
    try:
        document = json.loads(text.decode("utf-8"))
        content, expected = document["content"], document["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{path} is damaged: {error}") from error
    if _content_sha256(content) != expected:
        raise CheckpointDamaged(f"{path} is damaged: its content does not match its checksum")
    return content
