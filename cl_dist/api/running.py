"""Starts a run from Python, as `cl-dist run` does from a shell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from functools import partial
from pathlib import Path
from typing import IO, Any

from cl_dist.api.loaded_run import LoadedRun, load_run
from cl_dist.config.load import load_recipe
from cl_dist.config.overrides import as_overrides
from cl_dist.config.schema import Recipe
from cl_dist.errors import BadInput, ClDistError, Interrupted, RankLost
from cl_dist.launch.child import PROGRAM, python_command, signal_when_parent_dies

PREFIXES = ("cl-dist: error: ", "cl-dist: interrupted: ")
_KINDS: dict[int, type[ClDistError]] = {kind.exit_code: kind for kind in (BadInput, Interrupted, RankLost)}


def run(
    recipe: str | os.PathLike[str] | Recipe,
    *,
    resume: bool = False,
    fresh: bool = False,
    progress: bool = True,
    **changes: Any,
) -> LoadedRun:
    """Train a recipe's stream of tasks and return the run, as `load_run` does.

    The ranks are processes of their own, so nothing of this process (a GPU's memory, a patched library) reaches them.
    An interrupt (the stop button of a notebook) asks them to save their state, which `resume=True` continues.

    Args:
        recipe: Name of a shipped recipe, path of a YAML file, or a `Recipe`.
        resume: Continue the run in the recipe's `output_dir`.
        fresh: Move a run in `output_dir` aside and start a new one.
        progress: Print what the run reports, line by line.
        changes: Changed settings, as in `Recipe.load`: `method="migu"`, `train={"epochs": 2}`.

    Raises:
        BadInput: The recipe, its data or its model cannot be used.
        Interrupted: The run was asked to stop, and has saved its state.
        ClDistError: Training failed; the message says why.
    """
    with tempfile.TemporaryDirectory(prefix="cl-dist-") as folder:
        name = recipe.save(Path(folder) / "recipe.yaml") if isinstance(recipe, Recipe) else recipe
        name = os.fspath(name)
        overrides = as_overrides(changes)
        output_dir = load_recipe(name, overrides)[0].output_dir  # also refuses a bad recipe without another process
        options = [f"--set={override}" for override in overrides]
        options += ["--resume"] * resume + ["--fresh"] * fresh
        code, errors = _printed([*python_command(PROGRAM), "run", name, *options], progress)
    if code != 0:
        raise _failure(code, errors)
    return load_run(output_dir)


def _printed(command: list[str], progress: bool) -> tuple[int, list[str]]:
    """Run a command, print its output here as it comes, and return its exit code and its lines of standard error.

    A notebook shows what Python prints, but not what a child process writes to the descriptors that it inherits.
    """
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,  # an interrupt reaches the run once, from here
        preexec_fn=partial(signal_when_parent_dies, signal.SIGTERM),  # a killed kernel stops it: it saves its state
    )
    assert process.stdout is not None
    assert process.stderr is not None
    errors: list[str] = []
    reader = threading.Thread(target=_collect, args=(process.stderr, errors), daemon=True)
    reader.start()
    try:
        while True:
            try:
                for line in process.stdout:
                    if progress:
                        sys.stdout.write(line)
                        sys.stdout.flush()
                break
            except KeyboardInterrupt:  # asked to stop: the run saves its state, and then its output ends
                process.send_signal(signal.SIGINT)
        code = process.wait()
    except BaseException:
        process.kill()
        process.wait()
        raise
    reader.join()
    if progress:
        for line in errors:
            if not line.startswith(PREFIXES):  # those are in the exception
                sys.stderr.write(f"{line}\n")
    return code, errors


def _collect(stream: IO[str], lines: list[str]) -> None:
    lines.extend(line.rstrip("\n") for line in stream)


def _failure(code: int, errors: list[str]) -> ClDistError:
    """The exception for a run that ended with this exit code and these lines of standard error."""
    said = []
    for line in errors:
        for prefix in PREFIXES:
            if line.startswith(prefix):
                said.append(line.removeprefix(prefix))
    message = "\n".join(said or errors[-20:]) or f"the run ended with exit code {code} and said nothing"
    return _KINDS.get(code, ClDistError)(message)
