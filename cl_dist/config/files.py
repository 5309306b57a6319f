"""Files that a user names: recipes, data, model folders. Every way in which they are unusable becomes one sentence.

Checks that expect a problem report it themselves: opening a named pipe blocks forever, and some paths are impossible.
`boundary.refusing` is the safety net under them for what nobody expected.
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
# Subclasses of OSError that say nothing about the input: nobody reads our output, or the network is down.


def cache_folder() -> Path:
    """What runs on this machine share and can make again: `$CL_DIST_CACHE`, else `cl_dist` below `$XDG_CACHE_HOME`
    (`~/.cache`). Raises BadInput if there is no home folder.
    """
    if own := os.environ.get("CL_DIST_CACHE"):
        return expand(own, "CL_DIST_CACHE")
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cl_dist"
    except RuntimeError as error:  # in a container, say, for a user without an entry in /etc/passwd
        raise BadInput("this user has no home folder to keep caches in: set CL_DIST_CACHE to a folder") from error


def expand(written: str, setting: str) -> Path:
    """The path with `~` and `~user` replaced. Raises BadInput, which names the setting, for an unknown user."""
    try:
        return Path(written).expanduser()
    except RuntimeError as error:
        user, written = shorten(written.partition("/")[0]), show_path(written)
        raise BadInput(f"{setting}: {written}: there is no user {user[1:]!r} on this machine") from error


def is_there(path: Path) -> bool:
    """Whether anything exists at the path. Raises BadInput for an impossible path, as all functions here do."""
    return _mode(path) is not None


def is_folder(path: Path) -> bool:
    """Whether a folder exists at the path."""
    mode = _mode(path)
    return mode is not None and stat.S_ISDIR(mode)


def is_file(path: Path) -> bool:
    """Whether a regular file exists at the path."""
    mode = _mode(path)
    return mode is not None and stat.S_ISREG(mode)


def refuse_special(path: Path) -> None:
    """Raise BadInput for a pipe, a device or a socket: opening one may block forever."""
    mode = _mode(path)
    kind = None if mode is None else _SPECIAL.get(stat.S_IFMT(mode))
    if kind is not None:
        raise BadInput(f"{path} cannot be read: it is {kind}, and a file is needed")


def refuse_special_below(folder: Path) -> None:
    """Raise BadInput for the first pipe, device or socket anywhere below a folder.

    Call it before a library that opens every file it finds there.
    """
    for parent, _, names in os.walk(folder):
        for name in names:
            refuse_special(Path(parent, name))


def read_bytes(path: Path) -> bytes:
    """The content of a regular file. Raises BadInput if it cannot be read or is not one."""
    refuse_special(path)
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from error


def _mode(path: Path) -> int | None:
    """Type and permissions of what is at the path; None if nothing is.

    Raises BadInput if the system cannot say, for example because a name is too long.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise BadInput(f"the path {show_path(path)} cannot be used: {error.strerror}") from error
    except ValueError as error:  # a NUL byte or a lone surrogate
        shown = show_path(path)
        raise BadInput(f"the path {shown} cannot be used: it contains a character that no path can have") from error
