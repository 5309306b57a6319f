"""How much memory a rank may still allocate, on a machine without a GPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from cl_dist.engine import distributed
from cl_dist.engine.distributed import free_memory

ON_CPU = pytest.mark.skipif(torch.cuda.is_available(), reason="asks the GPU where there is one")


@ON_CPU
def test_ranks_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    alone = free_memory()
    physical = int(Path("/proc/meminfo").read_text().split()[1]) * 1024
    assert 0 < alone <= physical
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_memory() == pytest.approx(alone / 4, rel=0.5)


def limited(used: int, limit: str, inactive: int = 0) -> dict[str, str]:
    """The files of a control group of version 2."""
    return {"memory.max": limit, "memory.current": f"{used}\n", "memory.stat": f"anon 5\ninactive_file {inactive}\n"}


def limited_1(used: int, limit: str, inactive: int = 0) -> dict[str, str]:
    """The files of a control group of version 1."""
    content = f"inactive_file 3\ntotal_inactive_file {inactive}\n"
    return {"memory.limit_in_bytes": limit, "memory.usage_in_bytes": f"{used}\n", "memory.stat": content}


@pytest.mark.parametrize(
    ("own", "groups", "expected"),
    [
        ("0::/\n", {".": limited(300, "1000\n")}, 700),
        ("0::/\n", {".": limited(1300, "1000\n")}, 0),
        ("0::/\n", {".": limited(900, "1000\n", inactive=500)}, 600),
        ("0::/\n", {".": limited(300, "max\n")}, sys.maxsize),
        ("0::/\n", {}, sys.maxsize),
        # A Slurm step limits the job's group, around the task's.
        ("0::/job_1/step_0/task_0\n", {"job_1": limited(10, "100\n"), "job_1/step_0": limited(5, "max\n")}, 90),
        ("0::/job_1\n", {"job_2": limited(99, "100\n")}, sys.maxsize),
        ("5:cpu:/\n4:memory:/docker/1\n", {"memory/docker/1": limited_1(30, "100\n", inactive=10)}, 80),
        # A container without a namespace of its own sees the host's path, and its group at the top.
        ("4:hugetlb,memory:/docker/1\n0::/x\n", {"memory": limited_1(30, "100\n")}, 70),
        ("4:memory:/\n", {"memory": limited_1(30, f"{2**63 - 4096}\n")}, 2**63 - 4096 - 30),
    ],
)
def test_a_container_may_have_less(tmp_path: Path, own: str, groups: dict[str, dict[str, str]], expected: int) -> None:
    for group, files in groups.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (tmp_path / group / name).write_text(content)
    (tmp_path / "own").write_text(own)
    assert distributed._left_in_container(tmp_path, tmp_path / "own") == expected


def test_without_control_groups_nothing_limits(tmp_path: Path) -> None:
    assert distributed._left_in_container(tmp_path, tmp_path / "missing") == sys.maxsize
