"""Derives seeds from the position in the run alone, so that a resumed run draws the same random numbers."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Hash the parts into a seed in [0, 2^63) that is the same on every machine and Python version."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
