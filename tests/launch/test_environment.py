from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cl_dist.errors import BadInput
from cl_dist.launch import environment as environment_module
from cl_dist.launch.environment import Ranks, export_ranks, find_ranks, first_node, has_gpu, rank_environment
from cl_dist.launch.rendezvous import FIRST_PORT, PORTS


def torch_variables(rank: str = "1", world: str = "4", local: str = "1") -> dict[str, str]:
    return {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": local, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def open_mpi(rank: str = "1", world: str = "4", local: str = "1", local_size: str = "4") -> dict[str, str]:
    names = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE")
    return {**dict(zip(names, (rank, world, local, local_size), strict=True)), "PMIX_NAMESPACE": "prterun-host-17@1"}


def srun(rank: str = "1", tasks: str = "4", local: str = "1", nodes: str = "1") -> dict[str, str]:
    return {
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_ID": "0",
        "SLURM_PROCID": rank,
        "SLURM_STEP_NUM_TASKS": tasks,
        "SLURM_NTASKS": tasks,
        "SLURM_LOCALID": local,
        "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_NODELIST": "gpu[03-04]",
    }


def mpich(rank: str = "1", size: str = "2") -> dict[str, str]:
    return {"PMI_RANK": rank, "PMI_SIZE": size, "MPI_LOCALRANKID": rank, "MPI_LOCALNRANKS": size, "PMI_PORT": "h:1"}


SALLOC_SHELL = {**srun(rank="0", tasks="1", local="0"), "SLURM_NTASKS": "4"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    "environment", [{}, BATCH_SCRIPT, SALLOC_SHELL, srun(rank="0", tasks="1", local="0"), {"LOCAL_RANK": "0"}]
)
def test_without_a_launcher_there_are_no_ranks(environment: dict[str, str]) -> None:
    assert find_ranks(environment) is None


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (torch_variables(), Ranks(1, 4, 1, "torchrun or deepspeed")),
        (open_mpi(), Ranks(1, 4, 1, "Open MPI's mpirun")),
        (open_mpi(rank="0", world="1", local="0"), Ranks(0, 1, 0, "Open MPI's mpirun")),
        (srun(rank="2", local="0"), Ranks(2, 4, 0, "srun")),
        (mpich(), Ranks(1, 2, 1, "MPICH's mpiexec")),
        # MpiDefault=pmi2; the two tasks of a step in a job of four.
        (
            {**srun(tasks="2"), "SLURM_NTASKS": "4", "PMI_RANK": "1", "PMI_SIZE": "2"},
            Ranks(1, 2, 1, "srun"),
        ),
        ({**srun(tasks="2", nodes="2"), "PMI_RANK": "1", "PMI_SIZE": "2"}, Ranks(1, 2, 1, "srun")),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}, Ranks(1, 2, 1, "torchrun or deepspeed")),
    ],
)
def test_each_launcher_is_recognised(environment: dict[str, str], expected: Ranks) -> None:
    assert find_ranks(environment) == expected


@pytest.mark.parametrize(
    ("outer", "inner", "source"),
    [
        # One torchrun per node under srun, its ranks numbered as its rendezvous likes.
        (srun(rank="1", tasks="2", local="0", nodes="2"), torch_variables("0", "8", "0"), "torchrun or deepspeed"),
        (
            srun(rank="1", tasks="2", local="0"),
            {**torch_variables("0", "2", "0"), "TORCHELASTIC_RUN_ID": "x"},
            "torchrun or deepspeed",
        ),
        # mpirun starts its daemons with srun.
        (srun(rank="1", tasks="2", local="0", nodes="2"), open_mpi("2", "4", "0", "2"), "Open MPI's mpirun"),
    ],
)
def test_the_inner_one_of_nested_launchers_counts(outer: dict[str, str], inner: dict[str, str], source: str) -> None:
    ranks = find_ranks({**outer, **inner})
    assert ranks is not None
    assert ranks.source == source


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is 0, but WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        (torch_variables(rank="4"), "RANK=4, WORLD_SIZE=4 and LOCAL_RANK=1 contradict each other"),
        (torch_variables(rank="0", local="1"), "LOCAL_RANK=1 contradict each other"),
        (torch_variables(world="0"), "WORLD_SIZE=0"),
        (torch_variables(rank="-1"), "RANK is -1; it must be an integer of at least 0"),
        (torch_variables(world="two"), "WORLD_SIZE is two; it must be an integer"),
        ({"RANK": "1", "WORLD_SIZE": "4"}, "LOCAL_RANK is not set; it must be"),
        ({**open_mpi(), **torch_variables("0", "1", "0")}, "says rank 0 of 1, but Open MPI's mpirun says 1 of 4"),
        ({**srun(), **torch_variables("0", "4", "0")}, "says rank 0 of 4, but srun says 1 of 4"),
    ],
)
def test_inconsistent_variables_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(BadInput) as error:
        find_ranks(environment)
    assert str(error.value).startswith("environment: ")
    assert message in str(error.value)


def test_a_single_task_of_pmi2_is_not_a_rank() -> None:
    assert find_ranks({**srun(rank="0", tasks="1", local="0"), "PMI_RANK": "0", "PMI_SIZE": "1"}) is None


def exported(environment: dict[str, str]) -> dict[str, str]:
    ranks = find_ranks(environment)
    assert ranks is not None
    environment = dict(environment)
    export_ranks(ranks, environment)
    return environment


def test_torch_gets_what_torchrun_set() -> None:
    assert exported(torch_variables()) == {**exported(torch_variables()), **torch_variables()}
    assert exported({**torch_variables(), "GLOO_SOCKET_IFNAME": "ib0"})["GLOO_SOCKET_IFNAME"] == "ib0"


@pytest.mark.parametrize("environment", [open_mpi(), {**torch_variables(), "LOCAL_WORLD_SIZE": "4"}])
def test_on_one_machine_ranks_listen_on_the_loopback(environment: dict[str, str]) -> None:
    found = exported(environment)
    assert (found["GLOO_SOCKET_IFNAME"], found["NCCL_SOCKET_IFNAME"]) == ("lo", "lo")
    assert exported({**environment, "NCCL_SOCKET_IFNAME": "ib0"})["NCCL_SOCKET_IFNAME"] == "ib0"


def test_on_several_machines_nccl_chooses_its_own_interface() -> None:
    assert "NCCL_SOCKET_IFNAME" not in exported({**torch_variables(), "LOCAL_WORLD_SIZE": "2"})


def test_on_one_machine_the_address_is_the_loopback() -> None:
    environment = exported(open_mpi())
    assert {name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")} == {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    assert FIRST_PORT <= int(environment["MASTER_PORT"]) < FIRST_PORT + PORTS


def test_srun_names_the_first_machine() -> None:
    assert exported(srun(nodes="2"))["MASTER_ADDR"] == "gpu03"


def test_with_mpi_on_several_machines_the_user_names_the_first() -> None:
    environment = open_mpi(local_size="2")
    with pytest.raises(
        BadInput, match="MASTER_ADDR is not set, and the 4 ranks of Open MPI's mpirun are not all on this"
    ):
        exported(environment)
    assert exported({**environment, "MASTER_ADDR": "node1"})["MASTER_ADDR"] == "node1"


def test_the_port_is_the_same_on_all_ranks_and_differs_between_jobs() -> None:
    ports = [exported(srun(rank=str(rank), local="0"))["MASTER_PORT"] for rank in range(4)]
    assert len(set(ports)) == 1
    assert exported({**srun(), "SLURM_JOB_ID": "18"})["MASTER_PORT"] != ports[0]
    assert exported({**srun(), "SLURM_STEP_ID": "1"})["MASTER_PORT"] != ports[0]


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a", "a"), ("a,b", "a"), ("gpu[03-07,12],login", "gpu03"), ("gpu[3,5-6]", "gpu3"), ("a,gpu[1-2]", "a"),
     ("r[1-2]-ib,x", "r1-ib")],
)  # fmt: skip
def test_the_first_of_slurms_node_list(nodes: str, first: str) -> None:
    assert first_node(nodes) == first


@given(world=st.integers(1, 64), data=st.data())
def test_ranks_survive_the_export(world: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, world - 1))
    local = data.draw(st.integers(0, rank))
    environment = exported(open_mpi(str(rank), str(world), str(local), str(world)))
    again = find_ranks({name: environment[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")})
    assert again is not None
    assert (again.rank, again.world_size, again.local_rank) == (rank, world, local)


def test_threads_are_divided_among_the_ranks_by_default() -> None:
    cores = len(os.sched_getaffinity(0))
    assert rank_environment({}, 0, 1, 1)["OMP_NUM_THREADS"] == str(cores)
    assert rank_environment({}, 0, 2 * cores, 1)["OMP_NUM_THREADS"] == "1"
    assert rank_environment({"OMP_NUM_THREADS": "7"}, 0, 2, 1)["OMP_NUM_THREADS"] == "7"


def test_programs_next_to_python_are_last_on_the_path() -> None:
    beside = str(Path(sys.executable).parent)
    assert rank_environment({"PATH": "/a:/b"}, 0, 1, 1)["PATH"] == f"/a:/b:{beside}"
    assert rank_environment({}, 0, 1, 1)["PATH"] == beside


def test_without_a_gpu_deepspeed_uses_the_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(environment_module, "DEVICE_FILES", (str(tmp_path / "absent"),))
    assert rank_environment({}, 0, 1, 1)["DS_ACCELERATOR"] == "cpu"
    assert rank_environment({"DS_ACCELERATOR": "xpu"}, 0, 1, 1)["DS_ACCELERATOR"] == "xpu"
    monkeypatch.setattr(environment_module, "DEVICE_FILES", (str(tmp_path),))
    assert "DS_ACCELERATOR" not in rank_environment({}, 0, 1, 1)
    assert has_gpu({"CUDA_VISIBLE_DEVICES": "1,2"})
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": ""})
    assert not has_gpu({"CUDA_VISIBLE_DEVICES": "-1"})
