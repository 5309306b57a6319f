from __future__ import annotations

import os
import socket
import subprocess

import pytest

from cl_dist.launch.child import python_command
from cl_dist.launch.rendezvous import (
    FIRST_PORT,
    PORTS,
    address_towards,
    derived_port,
    expand_nodes,
    find_free_port,
    free_port,
    interface_towards,
    job_name,
)


def test_a_taken_port_is_skipped() -> None:
    first = free_port("job 17")
    with socket.socket() as other:
        other.bind(("", first))
        other.listen()
        second = free_port("job 17")
    assert first != second
    assert {derived_port("job 17") <= port < FIRST_PORT + PORTS for port in (first, second)} == {True}


def test_jobs_start_looking_at_different_ports() -> None:
    ports = {derived_port(job_name({"SLURM_JOB_ID": str(number)})) for number in range(100)}
    assert len(ports) > 90


def test_the_program_prints_a_port() -> None:
    command = python_command("cl_dist.launch.rendezvous:program")
    done = subprocess.run(command, env={**os.environ, "SLURM_JOB_ID": "17"}, capture_output=True, text=True, check=True)
    assert FIRST_PORT <= int(done.stdout) < FIRST_PORT + PORTS


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("a", ["a"]),
        ("a,b", ["a", "b"]),
        ("gpu[03-05,12],login", ["gpu03", "gpu04", "gpu05", "gpu12", "login"]),
        ("gpu[08-11]", ["gpu08", "gpu09", "gpu10", "gpu11"]),
        ("gpu[9-10]", ["gpu9", "gpu10"]),
        ("r[1-2]-ib,x", ["r1-ib", "r2-ib", "x"]),
        ("r[1-2]n[3,5]", ["r1n3", "r1n5", "r2n3", "r2n5"]),
        ("", []),
    ],
)
def test_a_node_list_is_expanded(nodes: str, expected: list[str]) -> None:
    assert list(expand_nodes(nodes)) == expected


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "no-such-host.invalid", ""])
def test_neither_the_loopback_nor_an_unknown_host_has_an_interface(host: str) -> None:
    assert address_towards(host) is None
    assert interface_towards([host]) is None


def test_the_interface_exists() -> None:
    address = address_towards("192.0.2.1")
    if address is None:
        pytest.skip("this machine is on no network")
    assert interface_towards(["127.0.0.1", "192.0.2.1"]) in [name for _, name in socket.if_nameindex()]
    assert interface_towards([]) is None


def test_a_free_port_can_be_bound() -> None:
    port = find_free_port()
    assert 1024 < port < 65536
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", port))
