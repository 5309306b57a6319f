"""The last net around everything that reads what the user has given: recipes, paths, data, and code of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cl_dist.config.plugins import own_fault
from cl_dist.config.words import show_path
from cl_dist.errors import BadInput, ClDistError

_NOT_THE_INPUT = (BrokenPipeError, ConnectionError, TimeoutError)


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn errors that only unusable input can cause into BadInput; errors of other types are bugs and pass through.

    Such input is, for example, a path that is too long, a link to itself, a name that the file system cannot store, or
    a structure that is too deep or too large. Also works as a decorator.

    Args:
        what: The input in a few words, for the message.
    """
    try:
        with _blaming_own_code(what):
            yield
    except _NOT_THE_INPUT:
        raise
    except OSError as error:
        if error.filename is None:  # not about a path: a library that cannot be loaded, for example
            raise
        path = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else error.filename
        raise BadInput(f"{what}: {error.strerror}: {show_path(path)}; give another path") from error
    except UnicodeError as error:
        raise BadInput(f"{what}: holds text that is not UTF-8") from error
    except RecursionError as error:
        raise BadInput(f"{what}: nested too deeply") from error
    except (OverflowError, MemoryError) as error:
        raise BadInput(f"{what}: too large to be read ({type(error).__name__})") from error


@contextmanager
def _blaming_own_code(what: str) -> Iterator[None]:
    """Turn whatever the user's own method or format raises into BadInput, with the line that raised it."""
    try:
        yield
    except ClDistError:
        raise
    except (Exception, SystemExit) as error:
        fault = own_fault(error)
        if fault is None:
            raise
        raise BadInput(f"{what}: {fault} (run again with --debug for the traceback)") from error
