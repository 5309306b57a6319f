"""Checksums: damage to stored state is recognised and named, never trained on.

What cannot be read is not damaged: a file server that answers with an error today may answer with the file tomorrow.
Only a file that is missing, or is not what was written, may be given up for an older one.
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
"""Seconds before each further try to read what the system could not: a file handle that went stale, a busy server."""

Result = TypeVar("Result")


class CheckpointDamaged(ClDistError):
    """Stored state is incomplete or its bytes are not those that were written; the message names the file."""


class StateUnusable(ClDistError):
    """Stored state that may be whole, but that this process cannot read or understand; nothing may be deleted."""


def patiently(path: Path, read: Callable[[], Result]) -> Result:
    """Return what `read` returns; where the system fails to read `path`, try again for some seconds.

    Raises `CheckpointDamaged` where the file is missing or a folder, `StateUnusable` where the system goes on failing.
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
                raise StateUnusable(_unreadable(path, error)) from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def _unreadable(path: Path, error: OSError) -> str:
    """The sentence for a file that the system does not give."""
    reason = error.strerror or " ".join(str(error).split())
    return f"{path} cannot be read: {reason}; nothing was deleted, and --resume tries again"


def require_format(path: Path, found: Any, known: int) -> None:
    """Raise `StateUnusable` where a state has another format than this release reads: it is whole, but not for us."""
    if found != known:
        raise StateUnusable(
            f"{path} has format {found}, of another release of cl_dist; this one reads {known}; nothing was deleted, "
            "and --resume goes on with the release that wrote it"
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
    """SHA-256 of a JSON value, as it was parsed, in a canonical spelling."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_sealed(path: Path, content: Any) -> None:
    """Write a JSON value with its own checksum, atomically and durably; `ValueError` for NaN and infinity."""
    as_parsed = json.loads(json.dumps(content, allow_nan=False))  # keys become strings and tuples lists, as on reading
    write_json(path, {"sha256": _content_sha256(as_parsed), "content": as_parsed})


def read_sealed(path: Path) -> Any:
    """Read what `write_sealed` wrote.

    Raises `CheckpointDamaged` where the file is missing or was changed, `StateUnusable` where it cannot be read.
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
