"""Measurements on ranks of this machine: starts them, and is what each of them runs."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from cl_dist.errors import ClDistError
from cl_dist.launch.child import die_with_launcher, python_command, report_failure
from cl_dist.launch.local import launch
from cl_dist.process_end import end_with

TIMEOUT_SECONDS = 600.0


def measure_on_ranks(
    function: str,
    arguments: Mapping[str, Any],
    world: int,
    environment: Mapping[str, str] | None = None,
    enter: Sequence[str] = (),
) -> Any:
    """Call a function on every rank, and return what it returns on the first.

    Args:
        function: `module:name`. It is called once the process group stands.
        arguments: Its keyword arguments; they and the result are JSON values.
        world: Number of ranks.
        environment: The ranks' environment; None: this process's.
        enter: First words of each rank's command, which must replace themselves by the rest (`network.Link.enter`).

    Raises:
        ClDistError: A rank fails.
    """
    with tempfile.TemporaryDirectory(prefix="cl-dist-bench-") as folder:
        result = Path(folder) / "result.json"
        task = {"function": function, "arguments": dict(arguments), "result": str(result)}
        command = [*enter, *python_command("cl_dist.benchmarks.ranks:program"), json.dumps(task)]
        ending = launch(command, world, dict(os.environ if environment is None else environment))
        if ending.exit_code != 0:
            raise ClDistError("\n".join([*ending.output, f"measuring on {world} ranks: {ending.message}"]))
        return json.loads(result.read_text(encoding="utf-8"))


def program() -> None:
    """Entry point of a rank; the task is the only argument."""
    end_with(lambda: _main(**json.loads(sys.argv[1])))


def _main(function: str, arguments: dict[str, Any], result: str) -> int:
    os.dup2(2, 1)  # standard output is reserved for the table or the JSON document
    die_with_launcher(os.environ)
    try:
        _serve(function, arguments, Path(result))
    except ClDistError as error:
        report_failure(os.environ, error.exit_code, str(error))
        return error.exit_code
    return 0


def _serve(function: str, arguments: dict[str, Any], result: Path) -> None:
    from cl_dist.engine.distributed import join, leave, quiet_libraries

    rank = join(TIMEOUT_SECONDS).rank
    quiet_libraries(rank)
    module, _, name = function.partition(":")
    found = getattr(import_module(module), name)(**arguments)
    if rank == 0:
        result.write_text(json.dumps(found), encoding="utf-8")
    leave()
