"""Where what users give meets the operating system: the last net under the checks that know better.

A check that opens a file says itself what is wrong with it. What none of them has foreseen (a path that is too long, a
link to itself, a name that no file system can hold, a structure that is too deep or too large) is still the input's
fault and ends as one sentence. Errors of other types are bugs, and stay what they are.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from cl_dist.config.plugins import own_fault
from cl_dist.config.words import show_path
from cl_dist.errors import BadInput, ClDistError

_NOT_THE_INPUTS = (BrokenPipeError, ConnectionError, TimeoutError)
"""Of OSError: nobody reads our output, or the network is down."""


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turn errors that only unusable input explains into BadInput; `what` is the input, in a few words.

    Works as a decorator too.
    """
    try:
        with _blaming_own_code(what):
            yield
    except _NOT_THE_INPUTS:
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
    """Turn whatever a method or a format of the user's own raises into BadInput, with the line that did."""
    try:
        yield
    except ClDistError:
        raise
    except (Exception, SystemExit) as error:
        fault = own_fault(error)
        if fault is None:
            raise
        raise BadInput(f"{what}: {fault} (run again with --debug for the traceback)") from error
