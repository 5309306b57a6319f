"""Checksums: damage to stored state is recognised and named, never trained on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from cl_dist.errors import ClDistError
from cl_dist.heartbeat import beat
from cl_dist.state.atomic import write_json

_CHUNK_BYTES = 1 << 20


class CheckpointDamaged(ClDistError):
    """Stored state is incomplete or its bytes are not those that were written; the message names the file."""


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
    """Read what `write_sealed` wrote; `CheckpointDamaged` where the file is missing or was changed."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        content, expected = document["content"], document["sha256"]
    except FileNotFoundError as error:
        raise CheckpointDamaged(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointDamaged(f"{path} is damaged: {error}") from error
    if _content_sha256(content) != expected:
        raise CheckpointDamaged(f"{path} is damaged: its content does not match its checksum")
    return content
