"""Looking at and reading files that a user names: recipes, data, model folders.

Opening a named pipe waits for ever, and the system refuses some paths as such; each becomes one sentence here.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from cl_dist.config.words import shorten, show_path
from cl_dist.errors import BadInput

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def expand(written: str, setting: str) -> Path:
    """The path that a recipe's text means, with `~` and `~user` replaced; BadInput, naming the setting, for an unknown
    user.
    """
    try:
        return Path(written).expanduser()
    except RuntimeError as error:
        user, written = shorten(written.partition("/")[0]), show_path(written)
        raise BadInput(f"{setting}: {written}: no home folder of a user {user[1:]!r} is known here") from error


def is_there(path: Path) -> bool:
    """Whether there is anything at the path."""
    return _mode(path) is not None


def is_folder(path: Path) -> bool:
    """Whether the path is a folder."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: Path) -> bool:
    """Whether the path is a regular file."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def refuse_special(path: Path) -> None:
    """Raise BadInput for a pipe, a device or a socket, which is not read: opening it may wait for ever."""
    mode = _mode(path)
    kind = None if mode is None else _SPECIAL.get(stat.S_IFMT(mode))
    if kind is not None:
        raise BadInput(f"{path} cannot be read: it is {kind}, and a file is needed")


def refuse_special_below(folder: Path) -> None:
    """Raise BadInput for the first pipe, device or socket in a folder or the folders in it: for libraries that open
    whatever they find there.
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            refuse_special(Path(parent, name))


def read_bytes(path: Path) -> bytes:
    """All of a regular file; BadInput where it cannot be read or is none."""
    refuse_special(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _mode(path: Path) -> int | None:
    """Type and permissions of what is at the path, None where nothing is.

    Raises BadInput where the system cannot say, as for a name that is too long.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BadInput(f"the path {show_path(path)} cannot be used: {error.strerror}") from error
    except ValueError as error:  # a NUL byte, or half a surrogate pair
        shown = show_path(path)
        raise BadInput(f"the path {shown} cannot be used: it holds a character that no path can have") from error
