from __future__ import annotations

import os
import socket
import subprocess

from cl_dist.launch.interpreter import python_command
from cl_dist.launch.rendezvous import FIRST_PORT, PORTS, derived_port, free_port, job_name


def test_a_port_that_is_taken_is_passed_over() -> None:
    first = free_port("job 17")
    with socket.socket() as other:
        other.bind(("", first))
        other.listen()
        second = free_port("job 17")
    assert first != second
    assert {derived_port("job 17") <= port < FIRST_PORT + PORTS for port in (first, second)} == {True}


def test_jobs_look_in_different_places() -> None:
    ports = {derived_port(job_name({"SLURM_JOB_ID": str(number)})) for number in range(100)}
    assert len(ports) > 90


def test_the_batch_script_reads_it() -> None:
    command = python_command("cl_dist.launch.rendezvous:program")
    done = subprocess.run(command, env={**os.environ, "SLURM_JOB_ID": "17"}, capture_output=True, text=True, check=True)
    assert FIRST_PORT <= int(done.stdout) < FIRST_PORT + PORTS
