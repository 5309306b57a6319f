from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cl_dist.launch.environment import find_ranks
from cl_dist.launch.mpi import ask_mpi
from tests.mpi import MPIRUN, missing
from tests.ranks import REPOSITORY

REASON = missing()
needs_mpi = pytest.mark.skipif(REASON is not None, reason=REASON or "")

ASK = """
import dataclasses, json, os, sys
from cl_dist.launch.environment import find_ranks
from cl_dist.launch.mpi import ask_mpi
environment = {**os.environ, "OMPI_COMM_WORLD_LOCAL_RANK": os.environ["OMPI_COMM_WORLD_RANK"]}
ranks = ask_mpi(find_ranks(environment), environment)
answer = {**dataclasses.asdict(ranks), "port": environment.get("MASTER_PORT"), "to": environment.get("MASTER_ADDR")}
with open(f"answer-{os.environ['OMPI_COMM_WORLD_RANK']}.json", "w") as file:
    json.dump(answer, file)
"""


def mpirun(folder: Path, ranks: int, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in environment:
            variables.pop(name, None)
    return subprocess.run(
        [*MPIRUN, "-np", str(ranks), sys.executable, "-c", code],
        cwd=folder, env=variables, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def answers(folder: Path, done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    assert done.returncode == 0, done.stderr
    return [json.loads(path.read_text()) for path in sorted(folder.glob("answer-*.json"))]


@needs_mpi
def test_mpi_provides_ranks_and_meeting_point(tmp_path: Path) -> None:
    found = answers(tmp_path, mpirun(tmp_path, 3, ASK))
    assert [(answer["rank"], answer["world_size"], answer["local_rank"]) for answer in found] == [
        (0, 3, 0), (1, 3, 1), (2, 3, 2)
    ]  # fmt: skip
    assert {answer["to"] for answer in found} == {"127.0.0.1"}
    assert len({answer["port"] for answer in found}) == 1
    assert found[0]["port"] is not None


@needs_mpi
def test_the_users_settings_win(tmp_path: Path) -> None:
    found = answers(tmp_path, mpirun(tmp_path, 2, ASK, MASTER_ADDR="10.0.0.7", MASTER_PORT="1234"))
    assert {(answer["to"], answer["port"]) for answer in found} == {("10.0.0.7", "1234")}


@needs_mpi
def test_a_rank_that_fails_later_does_not_wait_for_the_others(tmp_path: Path) -> None:
    later = "\nimport time\nif ranks.rank == 1: sys.exit(3)\ntime.sleep(600)"
    assert mpirun(tmp_path, 2, ASK + later).returncode == 3


@needs_mpi
def test_without_mpi4py_the_environment_is_used(tmp_path: Path) -> None:
    found = answers(tmp_path, mpirun(tmp_path, 2, "import sys; sys.modules['mpi4py'] = None\n" + ASK))
    assert [(answer["rank"], answer["local_rank"], answer["port"]) for answer in found] == [(0, 0, None), (1, 1, None)]


@needs_mpi
def test_an_mpi_library_other_than_the_launchers_is_ignored(tmp_path: Path) -> None:
    names = {"RANK": "1", "SIZE": "2", "LOCAL_RANK": "1", "LOCAL_SIZE": "2"}
    environment = {**os.environ, **{f"OMPI_COMM_WORLD_{name}": value for name, value in names.items()}}
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert [(answer["rank"], answer["world_size"], answer["port"]) for answer in answers(tmp_path, done)] == [
        (1, 2, None)
    ]


def test_other_launchers_are_not_asked() -> None:
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = find_ranks(environment)
    assert ranks is not None
    assert ask_mpi(ranks, environment) is ranks
    assert "MASTER_PORT" not in environment
